"""The file of an import: it grows from its start, in one process at a time, and another may go on with it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from app.storage.disk import full_disk_translated

_READ_BYTES = 2**20


class GrowingFile:
    """An empty or begun file that is appended to and hashed on the way, locked until closed.

    Raises FileNotFoundError when it is not on this disk, BlockingIOError when another process has it: one that was
    stopped, lost its lease, and may wake up any time.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._file.close()
            raise
        self._digest = hashlib.sha256()
        self.bytes = 0
        """How many are there, from the start on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close and unlock."""
        self._file.close()

    def holds(self, count: int) -> bool:
        """Whether there are so many bytes."""
        return os.fstat(self._file.fileno()).st_size >= count

    def go_on_behind(self, count: int, beat: Callable[[], None]) -> None:
        """Keep the first `count` bytes, which are there, and hash them anew; `beat` is called after each MiB of them."""
        self._file.truncate(count)
        self._file.seek(0)
        self._digest, self.bytes = hashlib.sha256(), count
        while chunk := self._file.read(_READ_BYTES):
            self._digest.update(chunk)
            beat()

    def append(self, chunk: bytes) -> None:
        """Write behind what is there. Raises StorageFull."""
        self._digest.update(chunk)
        self.bytes += len(chunk)
        left = memoryview(chunk)
        with full_disk_translated():
            # A raw file may write less than asked when the disk is nearly full.
            while left:
                left = left[self._file.write(left) :]

    def sync(self) -> int:
        """Have what is there survive a power cut. Returns how many bytes that are."""
        with full_disk_translated():
            os.fsync(self._file.fileno())
        return self.bytes

    def sha256(self) -> str:
        """Of what is there, in hex."""
        return self._digest.hexdigest()
