"""Blobs as files on a local disk: `blobs/ab/<sha256>`, mode 0444, written elsewhere and moved in whole."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from app.errors import NotFound
from app.storage.disk import full_disk_translated, probe_disk, sync_directory
from app.storage.staging import StagedWriter
from app.storage.store import Beat, BlobInfo, blob_name, is_digest, still

# linux/fs.h: share the extents of another file until one of the two is written to.
_FICLONE = 0x40049409
_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_CANNOT_LINK = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP)


class LocalStore:
    """An ArtifactStore below `root`. Any number of processes may use the same one."""

    direct_uploads = None

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        self._root = root
        self._incoming = root / "staging" / "incoming"
        self._min_free = min_free_bytes

    def check(self) -> None:
        """Write a file: a full or read-only disk has been known to look well otherwise. Raises OSError."""
        self._root.mkdir(parents=True, exist_ok=True)
        probe_disk(self._root)

    def path_of(self, sha256: str) -> Path:
        """The file of a blob. Read only."""
        path = self._place(sha256)
        if not path.is_file():
            raise NotFound(f"The blob {sha256} is not in the store.", code="blob_missing")
        return path

    def url_of(self, sha256: str, **_: str) -> None:
        """None: the bytes of a file pass through us."""

    def put_file(self, path: Path, sha256: str, *, beat: Beat = still) -> None:
        """Keep a file whose sha256 the caller has computed; on the same disk it is linked, not copied.

        The file becomes read only. Its bytes and its name are synced before this returns. Raises StorageFull.
        A blob that is there already takes as much work as a new one: the time tells no tenant what others keep.
        """
        place = self._place(sha256)
        with full_disk_translated():
            place.parent.mkdir(parents=True, exist_ok=True)
            incoming = self._incoming_name()
            try:
                _link_or_copy(path, incoming)
                beat()
                incoming.chmod(0o444)
                _sync_file(incoming)
                # Unlike a rename of the original, this leaves the caller's file there if the transaction fails.
                if not self._touch(place):
                    incoming.rename(place)
            finally:
                incoming.unlink(missing_ok=True)
            self._touch(place)
            sync_directory(place.parent)

    def put_stream(self, chunks: Iterable[bytes]) -> BlobInfo:
        """Keep what the chunks add up to, hashed on the way. Raises StorageFull and then keeps nothing."""
        writer = StagedWriter(self._incoming_name(), self._min_free)
        try:
            for chunk in chunks:
                writer.write(chunk)
            staged = writer.close()
            self.put_file(staged.path, staged.sha256)
        finally:
            writer.abandon()
        return BlobInfo(staged.sha256, staged.bytes, self.path_of(staged.sha256).stat().st_mtime)

    def open(self, sha256: str) -> BinaryIO:
        """Open a blob for reading."""
        return self.path_of(sha256).open("rb")

    def materialize(self, sha256: str, target: Path, *, beat: Beat = still) -> None:
        """Make a blob appear as the read-only file `target`: cloned, else linked, else copied."""
        source = self.path_of(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        with full_disk_translated():
            if not _clone(source, target):
                _link_or_copy(source, target)
            beat()
            target.chmod(0o444)

    def exists(self, sha256: str) -> bool:
        """Whether there is such a blob."""
        return self._place(sha256).is_file()

    def delete(self, sha256: str) -> bool:
        """Remove a blob; whoever has it open can read on. False: there was none."""
        try:
            self._place(sha256).unlink()
        except FileNotFoundError:
            return False
        return True

    def iter_blobs(self) -> Iterator[BlobInfo]:
        """Every blob, in no order; `put_at` is when it was last put."""
        for path in self._root.glob("blobs/??/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                if is_digest(path.name):
                    yield BlobInfo(path.name, stat.st_size, stat.st_mtime)

    def remove_unfinished(self, *, older_than_seconds: float) -> int:
        """Remove files that were on their way in when their process died. Returns how many."""
        removed = 0
        for path in self._incoming.iterdir() if self._incoming.is_dir() else ():
            with suppress(FileNotFoundError):
                # When the link was made: the other times are those of the file it shares.
                if time.time() - path.stat().st_ctime > older_than_seconds:
                    path.unlink()
                    removed += 1
        return removed

    def _place(self, sha256: str) -> Path:
        return self._root / blob_name(sha256)

    def _incoming_name(self) -> Path:
        self._incoming.mkdir(parents=True, exist_ok=True)
        return self._incoming / secrets.token_hex(8)

    @staticmethod
    def _touch(place: Path) -> bool:
        """Mark a blob as just put, so that a collector leaves it alone. False: there is none."""
        try:
            os.utime(place)
        except FileNotFoundError:
            return False
        return True


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        try:
            shutil.copyfile(source, target)
        except OSError:
            target.unlink(missing_ok=True)
            raise


def _clone(source: Path, target: Path) -> bool:
    """Copy on write where the file system can (btrfs, xfs); False where it cannot."""
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new, _FICLONE, old.fileno())
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
        else:
            return True
    target.unlink()
    return False


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
