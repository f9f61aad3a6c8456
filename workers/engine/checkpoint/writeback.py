"""A file that is written in place, with its pages pushed to the disk and dropped from memory behind the writer."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

from workers.engine.checkpoint.layout import drop_from_page_cache

# One window is on its way to the disk while the next one fills.
_WINDOW_BYTES = 32 * 2**20
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)

Range = tuple[int, int]


class Writeback:
    """One file of known size. `write` may be called from several threads, for ranges that do not overlap."""

    def __init__(self, path: Path, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._size = size
        self._lock = threading.Lock()
        self._filling: list[Range] = []
        self._leaving: list[Range] = []
        # A process whose umask hides files would leave them unreadable to the API, which has another user.
        os.fchmod(self._descriptor, 0o644)

    def reserve(self) -> None:
        """Claim all of the file's space now, so that a full disk shows before the work, not after it."""
        os.posix_fallocate(self._descriptor, 0, self._size)

    def write(self, data: memoryview, offset: int) -> None:
        """Put bytes at an offset."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)
        starting, leaving = self._take_full_window((offset, len(data)))
        for begin, length in starting:
            _flush(self._descriptor, begin, length, _WRITE)
        for begin, length in leaving:
            _flush(self._descriptor, begin, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            drop_from_page_cache(self._descriptor, begin, length)

    def close(self, *, sync: bool) -> None:
        """Close the file, after everything has reached the disk if `sync`; a second call does nothing."""
        if self._descriptor < 0:
            return
        try:
            if sync:
                os.fsync(self._descriptor)
                drop_from_page_cache(self._descriptor, 0, self._size)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take_full_window(self, written: Range) -> tuple[list[Range], list[Range]]:
        """Note a range; when a window is full, give it out to be started, and the one before it to be awaited."""
        with self._lock:
            self._filling.append(written)
            if sum(length for _, length in self._filling) < _WINDOW_BYTES:
                return [], []
            starting, leaving = self._filling, self._leaving
            self._filling, self._leaving = [], starting
            return starting, leaving


def _flush(descriptor: int, offset: int, length: int, how: int) -> None:
    """Linux only: elsewhere the kernel's own writeback has to do, and the fsync at the end."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(how))
