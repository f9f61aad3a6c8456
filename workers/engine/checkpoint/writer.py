"""Write a checkpoint whose sizes are known beforehand: headers first, then each result where it belongs.

Written ranges are pushed to the disk while the next ones are computed and then dropped from the page cache, so
that neither dirty pages nor cache pile up behind a large model.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from app.errors import StorageFull
from app.spec.facts import BYTES_PER_ELEMENT, TensorFact
from workers.engine.checkpoint.layout import (
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_DTYPES,
    TensorEntry,
    encode_header,
)
from workers.engine.checkpoint.writeback import Writeback


class CheckpointWriter:
    """Writes the given tensors, in any order and by rows if wanted, into one or more safetensors files.

    A context manager: a clean exit checks that each byte of each tensor was written once and fsyncs; an exception
    removes everything it wrote. `write` and `write_rows` may be called from several threads. Raises StorageFull
    before the first tensor is written when the disk has no room for all.
    """

    def __init__(self, directory: Path, tensors: Sequence[TensorFact], max_shard_bytes: int) -> None:
        self.directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._facts = list(tensors)
        if len({fact.name for fact in self._facts}) != len(self._facts):
            raise ValueError("a tensor is named twice")
        self._entries: dict[str, TensorEntry] = {}
        self._files: dict[Path, Writeback] = {}
        self._written: dict[str, list[tuple[int, int]]] = {fact.name: [] for fact in self._facts}
        self._created: list[Path] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._check_room()
            self._create_files()
        except OSError as error:
            self._remove()
            raise _explained(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._check_complete()
                self._finish()
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor; dtype and shape must be those announced."""
        entry = self._entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(f"{name} was announced as {entry.shape} and is {tuple(tensor.shape)}")
        self.write_rows(name, 0, tensor.reshape(entry.rows, *entry.row_shape))

    def write_rows(self, name: str, start_row: int, tensor: Tensor) -> None:
        """Write rows from `start_row` on: (rows, *row_shape), in the dtype announced."""
        entry = self._entries[name]
        stop = start_row + tensor.shape[0]
        if tensor.dtype != entry.dtype or tuple(tensor.shape[1:]) != entry.row_shape or stop > entry.rows:
            raise ValueError(
                f"{name} was announced as {entry.dtype} {entry.shape}: {tensor.dtype} "
                f"{tuple(tensor.shape)} does not fit at row {start_row}"
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        try:
            self._files[entry.file].write(data.numpy().data, entry.offset + start_row * entry.row_nbytes)
        except OSError as error:
            raise _explained(error) from error
        with self._lock:
            self._written[name].append((start_row, stop))

    def _check_room(self) -> None:
        # Asked first: a reservation that fails would take the whole disk from others for a moment.
        if sum(fact.nbytes for fact in self._facts) > shutil.disk_usage(self.directory).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _create_files(self) -> None:
        shards = _split(self._facts, self._max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            file = self.directory / SINGLE_FILE
            if len(shards) > 1:
                file = self.directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header, offsets = encode_header(shard)
            size = len(header) + sum(fact.nbytes for fact in shard)
            self._files[file] = Writeback(file, size)
            self._created.append(file)
            self._files[file].reserve()
            self._files[file].write(memoryview(header), 0)
            for fact in shard:
                dtype = TORCH_DTYPES[fact.dtype]
                self._entries[fact.name] = TensorEntry(
                    fact.name, dtype, fact.shape, file, offsets[fact.name], fact.nbytes
                )
        if len(shards) > 1:
            self._write_index()

    def _write_index(self) -> None:
        weight_map = {fact.name: self._entries[fact.name].file.name for fact in self._facts}
        total = sum(fact.nbytes for fact in self._facts)
        file = self.directory / INDEX_FILE
        self._created.append(file)
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        file.chmod(0o644)

    def _check_complete(self) -> None:
        for name, ranges in self._written.items():
            position = 0
            for start, stop in sorted(ranges):
                if start != position:
                    raise RuntimeError(f"{name}: rows {position} to {start} were written twice or not at all")
                position = stop
            if position != self._entries[name].rows:
                raise RuntimeError(f"{name}: rows from {position} on were never written")

    def _finish(self) -> None:
        try:
            for file in self._files.values():
                file.close(sync=True)
            descriptor = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _explained(error) from error

    def _remove(self) -> None:
        for file in self._files.values():
            file.close(sync=False)
        for path in self._created:
            path.unlink(missing_ok=True)


def _split(facts: list[TensorFact], max_shard_bytes: int) -> list[list[TensorFact]]:
    """Cut the tensors into shards, keeping their order but for alignment."""
    shards: list[list[TensorFact]] = [[]]
    size = 0
    for fact in facts:
        if shards[-1] and size + fact.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(fact)
        size += fact.nbytes
    # Readers map tensors in place, which needs each to begin at a multiple of its element size.
    return [sorted(shard, key=lambda fact: -BYTES_PER_ELEMENT[fact.dtype]) for shard in shards]


def _explained(error: OSError) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageFull(
            "The disk has no room for the new weights; what was written of them is removed.",
            hint="Free some space on the worker's scratch disk, or compress to fewer bits.",
        )
    return error
