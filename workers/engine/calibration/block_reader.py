"""Bring the weights of block after block to where they are computed with.

For a GPU the next block is read while the present one is worked on, into pinned memory, which the GPU copies from by
itself. On a CPU that would hold two blocks in the memory that one is to be enough for.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from workers.engine.architectures.skeleton import Skeleton


class BlockReader:
    """Reads blocks of a skeleton, in order; see `reading_blocks`."""

    def __init__(self, skeleton: Skeleton, ahead: ThreadPoolExecutor | None) -> None:
        self._skeleton, self._pool = skeleton, ahead
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def load(self, index: int) -> dict[str, str]:
        """Give a block its weights. Returns their names in the checkpoint by those in the block.

        Raises IntakeError when the checkpoint lacks one.
        """
        if self._pool is None:
            return self._skeleton.materialise(self._skeleton.blocks[index], prefix=self._prefix(index))
        names = self._names(index)
        if self._next is not None and self._next[0] == index:
            weights = self._next[1].result()
        else:
            weights = self._read(index)
        for name, stored in names.items():
            self._skeleton.place(self._skeleton.blocks[index], name, weights.pop(stored))
        if index + 1 < len(self._skeleton.blocks):
            self._next = index + 1, self._pool.submit(self._read, index + 1)
        return names

    def _prefix(self, index: int) -> str:
        return f"{self._skeleton.blocks_name}.{index}."

    def _names(self, index: int) -> dict[str, str]:
        return self._skeleton.stored_names(self._skeleton.blocks[index], prefix=self._prefix(index))

    def _read(self, index: int) -> dict[str, Tensor]:
        return {stored: self._pinned(stored) for stored in self._names(index).values()}

    def _pinned(self, stored: str) -> Tensor:
        checkpoint = self._skeleton.checkpoint
        entry = checkpoint.tensors[stored]
        buffer = torch.empty(entry.rows * entry.row_nbytes, dtype=torch.uint8, pin_memory=True)
        return checkpoint.read_rows(stored, 0, entry.rows, out=buffer).view(entry.shape)


@contextmanager
def reading_blocks(skeleton: Skeleton) -> Iterator[BlockReader]:
    """A reader that reads ahead where the skeleton's device is a GPU; nothing is being read any more afterwards."""
    if skeleton.device == "cpu":
        yield BlockReader(skeleton, None)
        return
    with ThreadPoolExecutor(1) as ahead:
        yield BlockReader(skeleton, ahead)
