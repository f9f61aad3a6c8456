"""Staging: where files lie while they come in. Nothing here is ever the only copy of something that was promised.

Layout: `uploads/<upload id>` one file per open upload, `work/<random>/` one directory per intake under way.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.storage.disk import full_disk_translated, require_free

_CHECK_EVERY = 64 * 2**20


@dataclass(frozen=True)
class StagedFile:
    """A file in staging: where it is, its sha256 in hex, its size in bytes."""

    path: Path
    sha256: str
    bytes: int


class StagedWriter:
    """Writes one new file, hashing on the way and watching the disk. `close` makes it last."""

    def __init__(self, path: Path, min_free_bytes: int) -> None:
        self.path = path
        self.bytes = 0
        self._min_free = min_free_bytes
        self._checked = 0
        self._digest = hashlib.sha256()
        with full_disk_translated():
            require_free(path.parent, 0, min_free_bytes)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb", buffering=0)

    def write(self, chunk: bytes | memoryview) -> None:
        """Append a chunk."""
        if self.bytes - self._checked >= _CHECK_EVERY:
            require_free(self.path.parent, 0, self._min_free)
            self._checked = self.bytes
        self._digest.update(chunk)
        self.bytes += len(chunk)
        left = memoryview(chunk)
        with full_disk_translated():
            # A raw file may write less than asked when the disk is nearly full.
            while left:
                left = left[self._file.write(left) :]

    def close(self) -> StagedFile:
        """Sync and close; the file is complete."""
        with full_disk_translated(), self._file:
            os.fsync(self._file.fileno())
        return StagedFile(self.path, self._digest.hexdigest(), self.bytes)

    def abandon(self) -> None:
        """Close without keeping the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class WorkDirectory:
    """One directory of an intake under way, and the files written into it."""

    def __init__(self, path: Path, min_free_bytes: int) -> None:
        self.path = path
        self._min_free = min_free_bytes

    @contextmanager
    def writer(self, name: str) -> Iterator[StagedWriter]:
        """A writer for the file `name` (a safe relative path); the file is gone again if the block raises."""
        writer = StagedWriter(self._below(name), self._min_free)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise

    def write_all(self, name: str, chunks: Iterator[bytes]) -> StagedFile:
        """Write the chunks to the file `name`."""
        with self.writer(name) as writer:
            for chunk in chunks:
                writer.write(chunk)
            return writer.close()

    def require_free(self, wanted: int) -> None:
        """Raise StorageFull if `wanted` more bytes do not fit."""
        require_free(self.path, wanted, self._min_free)

    def _below(self, name: str) -> Path:
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{name!r} leaves the work directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Staging:
    """The staging area below `root`."""

    def __init__(self, root: Path, *, min_free_bytes: int) -> None:
        self.root = root
        self.min_free_bytes = min_free_bytes

    def upload_path(self, upload_id: str) -> Path:
        """Where the bytes of an upload lie."""
        directory = self.root / "uploads"
        directory.mkdir(parents=True, exist_ok=True)
        return directory / upload_id

    def require_free(self, wanted: int) -> None:
        """Raise StorageFull if `wanted` more bytes do not fit."""
        self.root.mkdir(parents=True, exist_ok=True)
        require_free(self.root, wanted, self.min_free_bytes)

    @contextmanager
    def work_directory(self) -> Iterator[WorkDirectory]:
        """A fresh directory, removed with all that is in it when the block ends, well or not."""
        path = self.root / "work" / secrets.token_hex(8)
        with full_disk_translated():
            path.mkdir(parents=True)
        try:
            yield WorkDirectory(path, self.min_free_bytes)
        finally:
            shutil.rmtree(path)

    def stray_uploads(self, *, older_than_seconds: float) -> Iterator[str]:
        """Ids of upload files nobody has written to for this long."""
        for path in sorted(self.upload_path("_").parent.iterdir()):
            if _age_seconds(path) > older_than_seconds:
                yield path.name

    def remove_stray_work(self, *, older_than_seconds: float) -> int:
        """Remove work directories left by a process that died. Returns how many."""
        work = self.root / "work"
        stray = [
            path
            for path in (work.iterdir() if work.exists() else ())
            if _age_seconds(path) > older_than_seconds
        ]
        for path in stray:
            shutil.rmtree(path, ignore_errors=True)
        return len(stray)


def _age_seconds(path: Path) -> float:
    """Since it was last written to; 0 for what somebody else has removed meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
