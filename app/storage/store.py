"""What a store of blobs can do. A blob is named by the sha256 of its bytes and never changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


@dataclass(frozen=True)
class BlobInfo:
    """A blob as the store lists it: digest in hex, size in bytes, seconds since the epoch when it was last put."""

    sha256: str
    bytes: int
    put_at: float


class ArtifactStore(Protocol):
    """Blobs by their sha256, in lower-case hex. A blob that is missing raises NotFound (`blob_missing`)."""

    def put_file(self, path: Path, sha256: str) -> None:
        """Keep a file whose sha256 the caller has computed. Idempotent; the file at `path` may become the blob."""

    def put_stream(self, chunks: Iterable[bytes]) -> BlobInfo:
        """Keep what the chunks add up to, hashed on the way."""

    def open(self, sha256: str) -> BinaryIO:
        """Open a blob for reading."""

    def materialize(self, sha256: str, target: Path) -> None:
        """Make a blob appear as the file `target`, which must not exist. Writing to it never changes the blob."""

    def exists(self, sha256: str) -> bool:
        """Whether there is such a blob."""

    def delete(self, sha256: str) -> bool:
        """Remove a blob. False: there was none."""

    def iter_blobs(self) -> Iterator[BlobInfo]:
        """Every blob, in no order."""
