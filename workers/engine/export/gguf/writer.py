"""Write a GGUF file whose sizes are known beforehand: the header, then each tensor's rows where they belong."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from app.errors import StorageFull
from app.spec.gguf_layout import GgufTensor, padded
from workers.engine.checkpoint.writeback import Writeback


class GgufFileWriter:
    """Writes the given tensors, in any order and by rows if wanted.

    A context manager: a clean exit checks that each row of each tensor was written once and fsyncs; an exception
    removes the file. `write_rows` may be called from several threads. Raises StorageFull before the first tensor is
    written when the disk has no room for all.
    """

    def __init__(self, path: Path, header: bytes, tensors: Sequence[GgufTensor]) -> None:
        self.path = path
        self._header = header
        self._offsets: dict[str, int] = {}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        position = len(header)
        for tensor in tensors:
            self._offsets[tensor.name] = position
            position += padded(tensor.nbytes)
        self.nbytes = position
        self._missing = {tensor.name: tensor.shape[0] for tensor in tensors}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self.nbytes > shutil.disk_usage(self.path.parent).free:
            raise _full()
        self._file = Writeback(self.path, self.nbytes)
        try:
            self._file.reserve()
            self._file.write(memoryview(self._header), 0)
        except OSError as error:
            self._remove()
            raise _explained(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._remove()
            return
        if unfinished := sorted(name for name, rows in self._missing.items() if rows):
            self._remove()
            raise RuntimeError(f"not every row of {unfinished[0]} was written once")
        try:
            self._file.close(sync=True)
        except OSError as failed:
            self._remove()
            raise _explained(failed) from failed

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Put the bytes of rows (rows, bytes of a row), uint8, at row `start` of a tensor."""
        tensor = self._tensors[name]
        width = tensor.nbytes // tensor.shape[0]
        if rows.dtype != torch.uint8 or rows.shape[1] != width:
            raise ValueError(f"a row of {name} has {width} bytes, not {rows.dtype} × {rows.shape[1]}")
        data = rows.contiguous().numpy().reshape(-1).data
        try:
            self._file.write(data, self._offsets[name] + start * width)
        except OSError as error:
            raise _explained(error) from error
        with self._lock:
            self._missing[name] -= len(rows)

    def _remove(self) -> None:
        self._file.close(sync=False)
        self.path.unlink(missing_ok=True)


def _full() -> StorageFull:
    return StorageFull(
        "The disk has no room for the GGUF file; what was written of it is removed.",
        hint="Free some space on the worker's scratch disk, or choose a mix of fewer bits.",
    )


def _explained(error: OSError) -> Exception:
    return _full() if error.errno in {errno.ENOSPC, errno.EDQUOT} else error
