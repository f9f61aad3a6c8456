"""What a store of blobs can do. A blob is named by the sha256 of its bytes and never changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol

if TYPE_CHECKING:
    # What it is made with, the API has where blobs are in S3 alone.
    from app.storage.s3_uploads import S3Uploads

_SHA256 = re.compile(r"[0-9a-f]{64}")

Beat = Callable[[], object]
"""Called now and then while bytes move, where that takes long every second; what it raises breaks the transfer off."""


@dataclass(frozen=True)
class BlobInfo:
    """A blob as the store lists it: digest in hex, size in bytes, seconds since the epoch when it was put."""

    sha256: str
    bytes: int
    put_at: float


def still() -> None:
    """Let a transfer run on: the beat of those who have nothing to say meanwhile."""


def is_digest(name: str) -> bool:
    """Whether this can name a blob."""
    return _SHA256.fullmatch(name) is not None


def blob_name(sha256: str) -> str:
    """Where a blob lies below the root of any store, so that one can be copied to another: `blobs/ab/<sha256>`."""
    if not is_digest(sha256):
        raise ValueError(f"{sha256!r} is no sha256 in lower-case hex")
    return f"blobs/{sha256[:2]}/{sha256}"


class ArtifactStore(Protocol):
    """Blobs by their sha256, in lower-case hex. A blob that is missing raises NotFound (`blob_missing`).

    A blob is there whole or not at all, whenever whoever puts it is killed. Where the bytes are behind a network,
    everything raises Unavailable when the service is away or refuses us.
    """

    @property
    def direct_uploads(self) -> S3Uploads | None:
        """Uploads that clients send here themselves; None where they cannot."""

    def check(self) -> None:
        """Raise Unavailable or OSError, saying what to do, unless blobs can be written here."""

    def put_file(self, path: Path, sha256: str, *, beat: Beat = still) -> None:
        """Keep a file whose sha256 the caller has computed. Idempotent; the file at `path` may become the blob."""

    def put_stream(self, chunks: Iterable[bytes]) -> BlobInfo:
        """Keep what the chunks add up to, hashed on the way."""

    def open(self, sha256: str) -> BinaryIO:
        """Open a blob for reading, at any place of it."""

    def path_of(self, sha256: str) -> Path | None:
        """The file of a blob, read only; None where blobs are no files of this machine."""

    def url_of(
        self, sha256: str, *, method: Literal["GET", "HEAD"], media_type: str, disposition: str
    ) -> str | None:
        """A URL that whoever has it may ask for the blob for a few minutes; None where there is no such thing."""

    def materialize(self, sha256: str, target: Path, *, beat: Beat = still) -> None:
        """Make a blob appear as the file `target`, which must not exist. Writing to it never changes the blob."""

    def exists(self, sha256: str) -> bool:
        """Whether there is such a blob."""

    def delete(self, sha256: str) -> bool:
        """Remove a blob. False: there was none."""

    def iter_blobs(self) -> Iterator[BlobInfo]:
        """Every blob, in no order."""

    def remove_unfinished(self, *, older_than_seconds: float) -> int:
        """Remove what processes that died have left half put. Returns how many. For the sweeper."""
