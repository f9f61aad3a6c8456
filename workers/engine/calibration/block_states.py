"""Where hidden states wait between two blocks: in files, or in a GPU's memory with a copy in a file every so often.

In files, one is read and one is written, and the roles change with each block: memory holds a few windows, and a job
that was killed goes on at the block it was at. A GPU would wait for the disk longer than it computes: where a quarter of
its free memory holds all states they stay there, and what a killed job loses is half a minute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from workers.engine.calibration.hidden_states import HiddenStates

# Of a GPU's free memory: the rest is for the block, its statistics and what is being solved.
_RESIDENT_SHARE = 1 / 4
_SECONDS_BETWEEN_COPIES = 30.0


@dataclass(frozen=True)
class StatesShape:
    """How many states there are, and what one is."""

    windows: int
    shape: tuple[int, ...]
    """(tokens, hidden) of a window."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return self.windows * torch.Size(self.shape).numel() * self.dtype.itemsize


class BlockStates(Protocol):
    """The states before a block, which its outputs replace: (windows, tokens, hidden)."""

    def read(self, number: int, count: int = 1) -> Tensor:
        """Those that the next block is given, of `count` windows from `number` on, on the device that computes."""

    def write(self, number: int, hidden: Tensor) -> None:
        """Put what the block made of windows from `number` on; to be read once the block is through."""

    def passed(self, block: int, *, keep: bool) -> bool:
        """All windows are through a block. Returns whether a later process could go on from here, if `keep` asks for it."""


class StatesInFiles:
    """Two files of the same size."""

    def __init__(self, files: tuple[HiddenStates, HiddenStates], block: int, device: str) -> None:
        self._files, self._device = files, device
        self._before, self._after = files[block % 2], files[(block + 1) % 2]

    def read(self, number: int, count: int = 1) -> Tensor:
        """See BlockStates."""
        return self._before.read(number, count).to(self._device)

    def write(self, number: int, hidden: Tensor) -> None:
        """See BlockStates."""
        self._after.write(number, hidden)

    def passed(self, block: int, *, keep: bool) -> bool:
        """See BlockStates."""
        if keep:
            self._after.sync()
        self._before, self._after = self._files[(block + 1) % 2], self._files[block % 2]
        return keep


class StatesOnDevice:
    """One tensor on the device, and files that it is copied to in turns: one of them is whole at any time."""

    def __init__(
        self, files: tuple[HiddenStates, HiddenStates], block: int, device: str, windows: int
    ) -> None:
        self._files = files
        self._states = torch.empty(windows, *files[0].shape, dtype=files[0].dtype, device=device)
        self._whole: int | None = None
        self._copied = time.monotonic()
        if block >= 0:
            self._whole = block % 2
            for number in range(windows):
                self._states[number] = files[self._whole].read(number)[0]

    def read(self, number: int, count: int = 1) -> Tensor:
        """See BlockStates."""
        return self._states[number : number + count].clone()

    def write(self, number: int, hidden: Tensor) -> None:
        """See BlockStates. In place: a window is read for the last time before its output is written."""
        self._states[number : number + len(hidden)] = hidden

    def passed(self, block: int, *, keep: bool) -> bool:
        """See BlockStates."""
        file = (block + 1) % 2
        due = time.monotonic() - self._copied >= _SECONDS_BETWEEN_COPIES
        if not keep or not due or file == self._whole:
            return False
        for number in range(len(self._states)):
            self._files[file].write(number, self._states[number : number + 1])
        self._files[file].sync()
        self._whole, self._copied = file, time.monotonic()
        return True


@contextmanager
def open_states(directory: Path, states: StatesShape, *, device: str, block: int) -> Iterator[BlockStates]:
    """The states while `block` is worked on; its inputs are in the file of its parity, as an earlier process left it.

    −1: the embeddings, which have none.
    """
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(
                HiddenStates(directory / f"states-{parity}", states.windows, states.shape, states.dtype)
            )
            for parity in (0, 1)
        )
        if _fits(states.nbytes, device):
            yield StatesOnDevice((first, second), block, device, states.windows)
        else:
            yield StatesInFiles((first, second), block, device)


def _fits(nbytes: int, device: str) -> bool:
    if device == "cpu":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= _RESIDENT_SHARE * free
