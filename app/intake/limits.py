"""How much may come out of an archive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from app.intake.refusals import refused

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Entry:
    """A regular file in an archive: its name as it stands there, and its bytes."""

    name: str
    chunks: Iterator[bytes]


@dataclass
class ArchiveLimits:
    """Caps on one archive, counted while it is unpacked: what it claims about itself is only asked to refuse sooner."""

    max_bytes: int = 200 * GIB
    max_entries: int = 2000
    max_ratio: int = 100
    """Weights compress by a third at best; text by a factor of ten."""
    free_bytes: int = 16 * MIB
    """So much may come out of an archive of any size."""
    archive_bytes: int = 0
    unpacked: int = field(default=0, init=False)

    def check_entries(self, count: int) -> None:
        """Refuse more files than a model has."""
        if count > self.max_entries:
            raise refused("too_many_files", f"The archive has more than {self.max_entries} entries.")

    def add(self, size: int) -> None:
        """Count bytes that came out."""
        self.unpacked += size
        self.expect(0)

    def expect(self, size: int) -> None:
        """Refuse an archive out of which `size` bytes more would be too many."""
        total = self.unpacked + size
        if total > self.max_bytes:
            raise refused("archive_bomb", f"The archive unpacks to more than {self.max_bytes} bytes.")
        self.check_ratio(total, self.archive_bytes)

    def check_ratio(self, unpacked: int, packed: int) -> None:
        """Refuse so many bytes out of so few."""
        if unpacked > max(self.free_bytes, self.max_ratio * packed):
            raise refused(
                "archive_bomb",
                f"{packed} bytes of the archive unpack to over {self.max_ratio} times as many.",
            )
