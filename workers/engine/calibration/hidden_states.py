"""Hidden states of all windows between two blocks, in a file: what one block leaves is what the next one takes."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from workers.engine.checkpoint.layout import drop_from_page_cache


class HiddenStates:
    """(windows, tokens, hidden) in one dtype. A context manager that closes the file and leaves it."""

    def __init__(self, path: Path, windows: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._nbytes = torch.Size(shape).numel() * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.posix_fallocate(self._descriptor, 0, windows * self._nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, number: int, count: int = 1) -> Tensor:
        """The states of `count` windows from `number` on: (count, tokens, hidden)."""
        buffer = torch.empty(count * self._nbytes, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        while done < len(view):
            read = os.preadv(self._descriptor, [view[done:]], number * self._nbytes + done)
            if read == 0:
                raise OSError("the file of hidden states ended early")
            done += read
        return buffer.view(self.dtype).view(count, *self.shape)

    def write(self, number: int, hidden: Tensor) -> None:
        """Put the states of windows from `number` on: (windows, tokens, hidden)."""
        data = hidden.to(self.dtype).cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], number * self._nbytes + done)

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        os.fsync(self._descriptor)
        drop_from_page_cache(self._descriptor, 0, 0)
