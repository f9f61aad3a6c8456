"""Read a checkpoint tensor by tensor, or rows at a time, without ever holding more than what was asked for.

Every read opens the file, preads into a buffer of its own and drops the range from the page cache: nothing stays
mapped or open, so memory follows the largest slab, not the model. Safe to call from several threads.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import IntakeError
from app.spec.facts import TensorFact
from workers.engine.checkpoint.layout import (
    TensorEntry,
    drop_from_page_cache,
    read_entries,
    weight_files,
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a Hugging Face directory, known by their headers. Make one with `Checkpoint.open`."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    """In the order they are stored."""

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read config.json and all headers. Raises IntakeError when a file is missing, damaged or contradicts another."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, TensorEntry] = {}
        for file in weight_files(directory):
            for entry in read_entries(file):
                if entry.name in tensors:
                    raise IntakeError(
                        f"{entry.name} is both in {tensors[entry.name].file.name} and in {file.name}.",
                        code="duplicate_tensor",
                        hint="Upload the files of one model only.",
                    )
                tensors[entry.name] = entry
        return cls(directory=directory, config=config, tensors=tensors)

    def facts(self) -> list[TensorFact]:
        """Name, dtype and shape of each tensor, in the order they are stored."""
        return [entry.fact for entry in self.tensors.values()]

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        entry = self.tensors[name]
        return self.read_rows(name, 0, entry.rows).view(entry.shape)

    def read_rows(self, name: str, start: int, stop: int, *, out: Tensor | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor: (stop - start, *row_shape); a scalar is one row.

        With `out`, a flat uint8 buffer of enough bytes, the rows are read into it and share its memory.
        """
        entry = self.tensors[name]
        if not 0 <= start <= stop <= entry.rows:
            raise ValueError(f"{name} has no rows {start} to {stop}")
        nbytes = (stop - start) * entry.row_nbytes
        buffer = torch.empty(nbytes, dtype=torch.uint8) if out is None else out[:nbytes]
        _pread(entry.file, entry.offset + start * entry.row_nbytes, buffer)
        return buffer.view(entry.dtype).view(stop - start, *entry.row_shape)

    def parameters(self) -> int:
        """Number of stored weights."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())


def _pread(file: Path, offset: int, buffer: Tensor) -> None:
    view = buffer.numpy().data
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise IntakeError(
                    f"{file.name} ended before its last tensor.",
                    code="damaged_weights",
                    hint="Upload the file again and compare its sha256 with the original's.",
                )
            done += count
        drop_from_page_cache(descriptor, offset, len(view))
    finally:
        os.close(descriptor)
