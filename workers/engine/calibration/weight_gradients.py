"""How a model's loss depends on each weight, with one block's weights in memory at a time.

Idea: forward block by block, keeping on disk what every block is given; the loss and its slope at the outputs of the last
one; then the blocks backwards, each run once more on its inputs to turn the slope at its outputs into that at its
inputs and at its weights. Kept is the mean over windows of |∂L/∂w|, L the loss of a window, of which signs cannot cancel
(Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", eq. 4 with p = 1), and
the mean over tokens of (∂L/∂y)² at each output y of a layer.

inputs                what every block is given, and what the last one gives; written under another name until it is whole
slopes-0, slopes-1    ∂L/∂h between the blocks, read and written by turns
gradients-00003       what is kept of block 3, as safetensors; a block with it is finished
probed-00003          what a probe found of block 3, as JSON

A job that was killed goes on at the block it was at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from app.errors import JobFailed
from workers.engine.architectures.skeleton import BlockCall, Skeleton
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.gradient_sums import slope_at_inputs, summed_gradients
from workers.engine.calibration.hidden_states import HiddenStates
from workers.engine.calibration.model_tail import ModelTail
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.layout import read_entries
from workers.engine.freed_memory import release_freed_memory

# Of the whole: the forward, the end of the model, and the rest for what goes backwards.
_FORWARD, _TAIL = 0.25, 0.35


@dataclass(frozen=True)
class WeightGradients:
    """The mean of |∂L/∂w| over windows, of all weights wanted; in files of a directory."""

    directory: Path

    def file(self, index: int) -> Path:
        """Where those of a block lie."""
        return self.directory / f"gradients-{index:05d}"

    def of_block(self, index: int) -> Checkpoint:
        """Those of a block by the stored names of the weights, to be read one by one: bfloat16, in the weights' shapes."""
        entries = {entry.name: entry for entry in read_entries(self.file(index))}
        return Checkpoint(self.directory, {}, entries)

    def probed_file(self, index: int) -> Path:
        """Where what a probe found of a block lies."""
        return self.directory / f"probed-{index:05d}"

    def probed(self) -> list[dict[str, Any]]:
        """What a probe found of each block, in order."""
        return [json.loads(path.read_text()) for path in sorted(self.directory.glob("probed-*"))]


Probe = Callable[[LiveBlock, dict[str, Tensor]], dict[str, Any]]
"""Called with a block as it came and, for each of its wanted weights by stored name, the mean over all tokens of (∂L/∂y)²:
(outputs,), float32. Returns what it found, fit for JSON."""


def gather_gradients(
    calibration: Calibration, wanted: Container[str], *, seed: int, probe: Probe | None = None
) -> WeightGradients:
    """Find the gradients of the weights with these stored names, on all windows; in the spool directory.

    `seed`: of the noise that encoders' losses are made of. Raises JobFailed when a gradient is not finite; IntakeError
    when the checkpoint lacks a tensor.
    """
    kept = WeightGradients(calibration.spool_directory)
    windows = calibration.windows
    finished = kept.file if probe is None else kept.probed_file
    if finished(0).is_file():
        return kept
    skeleton = Skeleton.open(calibration.directory, windows, calibration.device, calibration.dtype)
    calls = skeleton.record_calls(windows[:1])
    # Backwards: the finished blocks are the last ones.
    unfinished = next((i for i in range(len(calls)) if finished(i).is_file()), len(calls))
    with _spools(calibration, skeleton, len(calls)) as (inputs, slopes):
        backward = _Backward(calibration, skeleton, calls, inputs, slopes)
        if unfinished == len(calls):
            backward.through_tail(seed)
        for index in reversed(range(unfinished)):
            with backward.live(index) as block:
                means, squares = backward.through_block(block, wanted)
                _save(means, kept.file(index))
                del means
                if probe is not None:
                    _write(json.dumps(probe(block, squares)).encode(), kept.probed_file(index))
    for name in ("inputs", "slopes-0", "slopes-1"):
        (calibration.spool_directory / name).unlink()
    return kept


@contextmanager
def _spools(
    calibration: Calibration, skeleton: Skeleton, blocks: int
) -> Iterator[tuple[HiddenStates, list[HiddenStates]]]:
    """The files of hidden states, those of the inputs filled."""
    windows = len(calibration.windows)
    shape = tuple(skeleton.embed(calibration.windows[:1]).shape[1:])
    whole, part = (calibration.spool_directory / name for name in ("inputs", "inputs-unfinished"))
    if not whole.is_file():
        with HiddenStates(part, (blocks + 1) * windows, shape, calibration.dtype) as states:
            _keep_inputs(calibration, states, blocks)
        part.rename(whole)
    with ExitStack() as stack:
        inputs = stack.enter_context(HiddenStates(whole, (blocks + 1) * windows, shape, calibration.dtype))
        slopes = [
            stack.enter_context(HiddenStates(path, windows, shape, calibration.dtype))
            for path in (calibration.spool_directory / f"slopes-{parity}" for parity in (0, 1))
        ]
        yield inputs, slopes


def _keep_inputs(calibration: Calibration, states: HiddenStates, blocks: int) -> None:
    """Write what each block is given, all windows of a block together, and then what the last block gives."""
    windows, seen = len(calibration.windows), dict.fromkeys(range(blocks), 0)

    def visit(index: int, before: Tensor, after: Tensor) -> None:
        states.write(index * windows + seen[index], before)
        if index == blocks - 1:
            states.write(blocks * windows + seen[index], after)
        seen[index] += len(before)
        if seen[index] == windows:
            release_freed_memory()

    stream_blocks(_telling(calibration, 0.0, _FORWARD, "forward"), visit)
    states.sync()


@dataclass(frozen=True)
class _Backward:
    """What is gone through from the model's end to its beginning."""

    calibration: Calibration
    skeleton: Skeleton
    calls: list[BlockCall]
    inputs: HiddenStates
    slopes: list[HiddenStates]

    def through_tail(self, seed: int) -> None:
        """Write the slope at the last block's outputs."""
        windows, blocks = self.calibration.windows, len(self.calls)
        progress = _telling(self.calibration, _FORWARD, _TAIL, "backward").progress
        with ModelTail.open(self.skeleton, self.calls) as tail:
            for number in range(len(windows)):
                hidden = self.inputs.read(blocks * len(windows) + number).to(self.calibration.device)
                generator = torch.Generator().manual_seed(seed + number)
                slope = tail.slope(windows[number : number + 1], hidden, generator)
                self.slopes[blocks % 2].write(number, slope)
                progress((number + 1) / len(windows), "the loss")
        self.slopes[blocks % 2].sync()

    def through_block(
        self, block: LiveBlock, wanted: Container[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Turn the slope at a block's outputs into that at its inputs.

        Returns, in float32 by stored names, the mean over windows of |∂L/∂w|, and that over tokens of (∂L/∂y)².
        """
        before, after = self.slopes[block.index % 2], self.slopes[(block.index + 1) % 2]
        chosen = {inside: name for inside, name in block.stored_names.items() if name in wanted}
        with summed_gradients(block.module, chosen) as (gradients, squares):
            for number in range(block.windows):
                slope = after.read(number).to(self.calibration.device)
                before.write(number, slope_at_inputs(block.call, block.module, block.window(number), slope))
                self._tell(block.index, (number + 1) / block.windows)
        before.sync()
        tokens = self.calibration.windows.numel()
        return (
            {name: total / block.windows for name, total in gradients.items()},
            {name: total / tokens for name, total in squares.items()},
        )

    @contextmanager
    def live(self, index: int) -> Iterator[LiveBlock]:
        """A block with its weights in memory."""
        windows, module = len(self.calibration.windows), self.skeleton.blocks[index]
        stored = self.skeleton.materialise(module, prefix=f"{self.skeleton.blocks_name}.{index}.")

        def window(number: int) -> Tensor:
            return self.inputs.read(index * windows + number).to(self.calibration.device)

        def alive() -> None:
            self._tell(index, 1.0)

        def each() -> Iterator[Tensor]:
            for number in range(windows):
                yield window(number)
                alive()

        scratch = self.calibration.spool_directory
        yield LiveBlock(index, module, stored, self.calls[index], each, windows, window, scratch, alive)
        module.to("meta")
        release_freed_memory()

    def _tell(self, index: int, share: float) -> None:
        """Say how far a block is."""
        done = (len(self.calls) - 1 - index + share) / len(self.calls)
        told = _telling(self.calibration, _TAIL, 1.0, "backward").progress
        told(done, f"block {index + 1} of {len(self.calls)}")


def _save(means: dict[str, Tensor], file: Path) -> None:
    """Raises JobFailed when one is not finite."""
    for name, mean in means.items():
        if not torch.isfinite(mean).all():
            raise JobFailed(
                f"The gradient of {name} is NaN or infinite on the calibration text.",
                code="non_finite_gradients",
                hint="Check that the original gives sensible outputs in float32, or use a criterion without gradients.",
            )
    # The order among weights needs no more than three digits.
    _write(save({name: mean.to(torch.bfloat16).cpu().contiguous() for name, mean in means.items()}), file)


def _write(content: bytes, file: Path) -> None:
    """Write a file that is there whole or not at all."""
    part = file.with_name("unfinished")
    with part.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    part.rename(file)


def _telling(calibration: Calibration, begin: float, end: float, what: str) -> Calibration:
    """The same with progress from `begin` to `end`."""
    return replace(
        calibration,
        progress=lambda share, message: calibration.progress(
            begin + (end - begin) * share, f"{what}, {message}"
        ),
    )
