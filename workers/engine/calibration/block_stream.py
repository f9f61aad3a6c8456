"""Run a model over windows of tokens block by block, with one block's weights in memory at a time.

Hidden states wait in a spool file between blocks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from workers.engine.architectures.skeleton import BlockCall, Skeleton
from workers.engine.technique import Progress

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a block's index, its input and its output, each (1, tokens, hidden) in fp32."""


@dataclass(frozen=True)
class LiveBlock:
    """One block with its weights in memory, in fp32, and all inputs it has from the blocks before."""

    index: int
    module: nn.Module
    stored_names: dict[str, str]
    """Names in the checkpoint by names within the block."""
    run: Callable[[], None]
    """Run the block on every window and forget the outputs: for hooks to look on."""


Prepare = Callable[[LiveBlock], None]


def _nothing(block: LiveBlock) -> None:
    """Leave the block as it is."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model, and what is run through it."""

    directory: Path
    windows: Tensor
    """(windows, tokens), int64, all of one length."""
    spool_directory: Path
    """Needs windows × tokens × hidden × 4 bytes of disk for as long as blocks are streamed."""
    device: str
    progress: Progress


@torch.inference_mode()
def stream_blocks(
    calibration: Calibration, visit: Visit | None = None, *, prepare: Prepare = _nothing
) -> None:
    """Call `visit` for every block and window, blocks in order.

    `prepare` is called for each block first and may change its weights: what follows sees the outputs of those.
    Raises IntakeError when the checkpoint lacks a tensor of a block.
    """
    windows, device, progress = calibration.windows, calibration.device, calibration.progress
    skeleton = Skeleton.open(calibration.directory, windows, device)
    calls = skeleton.record_calls(windows[:1])
    first = skeleton.embed(windows[:1])
    with _Spool(calibration.spool_directory, len(windows), first.shape[1:]) as spool:
        for number in range(len(windows)):
            spool.write(number, skeleton.embed(windows[number : number + 1]))
        passes = 1 if prepare is _nothing else 2

        def said(index: int, done: int) -> None:
            share = (index + done / (passes * len(windows))) / len(calls)
            progress(share, f"block {index + 1} of {len(calls)}")

        for index, (block, call) in enumerate(zip(skeleton.blocks, calls, strict=True)):
            stored = skeleton.materialise(block, prefix=f"{skeleton.blocks_name}.{index}.")

            def run(index: int = index, block: nn.Module = block, call: BlockCall = call) -> None:
                for number in range(len(windows)):
                    call.run(block, spool.read(number).to(device))
                    said(index, number + 1)

            prepare(LiveBlock(index, block, stored, run))
            for number in range(len(windows)):
                hidden = spool.read(number).to(device)
                output = call.run(block, hidden)
                if visit is not None:
                    visit(index, hidden, output)
                spool.write(number, output)
                said(index, (passes - 1) * len(windows) + number + 1)
            block.to("meta")


class _Spool:
    """Hidden states of all windows in one unnamed file: (windows, tokens, hidden) in fp32."""

    def __init__(self, directory: Path, windows: int, shape: torch.Size) -> None:
        self._shape = shape
        self._nbytes = shape.numel() * 4
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by __exit__
        os.posix_fallocate(self._file.fileno(), 0, windows * self._nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, number: int) -> Tensor:
        raw = bytearray(os.pread(self._file.fileno(), self._nbytes, number * self._nbytes))
        return torch.frombuffer(raw, dtype=torch.float32).view(1, *self._shape)

    def write(self, number: int, hidden: Tensor) -> None:
        data = np.ascontiguousarray(hidden[0].float().cpu().numpy())
        os.pwrite(self._file.fileno(), data.tobytes(), number * self._nbytes)
