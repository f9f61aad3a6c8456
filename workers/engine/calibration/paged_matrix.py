"""A large square matrix in a file that is mapped into memory: its pages can be given back while it is not needed."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from app.spec.calibration_memory import PAGED_FEATURES


class PagedMatrix:
    """(size, size), float32, zeros at first. The file has no name and goes with the mapping."""

    def __init__(self, size: int, directory: Path) -> None:
        """Make the file in `directory`. Raises OSError when the disk is full."""
        self._row_bytes = size * torch.float32.itemsize
        with tempfile.TemporaryFile(dir=directory) as file:
            file.truncate(size * self._row_bytes)
            self._map = mmap.mmap(file.fileno(), size * self._row_bytes)
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=torch.float32).view(size, size)

    def release(self, rows: slice) -> None:
        """Give the memory of these rows back to the system; what they hold stays in the file, and is read when it is used."""
        start = -(-rows.start * self._row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = rows.stop * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def is_paged(size: int, device: torch.device) -> bool:
    """Whether a matrix of this size is worth a file."""
    return device.type == "cpu" and size >= PAGED_FEATURES
