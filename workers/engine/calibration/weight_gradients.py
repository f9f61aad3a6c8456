"""How a model's loss depends on each weight, with one block's weights in memory at a time.

Idea: forward block by block, keeping on disk what every block is given; the loss and its slope at the outputs of the last
one; then the blocks backwards, each run once more on its inputs to turn the slope at its outputs into that at its
inputs and at its weights. One window's gradient is ∂L/∂w of its own mean loss; kept is the mean of |∂L/∂w| over
windows, of which signs cannot cancel (Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large
Language Models", eq. 4 with p = 1).

inputs                what every block is given, and what the last one gives; written under another name until it is whole
slopes-0, slopes-1    ∂L/∂h between the blocks, read and written by turns
gradients-00003       what is kept of block 3, as safetensors; a block with it is finished

A job that was killed goes on at the block it was at.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app.errors import JobFailed
from workers.engine.architectures.skeleton import BlockCall, Skeleton
from workers.engine.calibration.block_stream import Calibration, stream_blocks
from workers.engine.calibration.hidden_states import HiddenStates
from workers.engine.calibration.model_tail import ModelTail
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.layout import read_entries

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


def gather_gradients(calibration: Calibration, wanted: Container[str], *, seed: int) -> WeightGradients:
    """Find the gradients of the weights with these stored names, on all windows; in the spool directory.

    `seed`: of the noise that encoders' losses are made of. Raises JobFailed when a gradient is not finite; IntakeError
    when the checkpoint lacks a tensor.
    """
    kept = WeightGradients(calibration.spool_directory)
    windows = calibration.windows
    if kept.file(0).is_file():
        return kept
    skeleton = Skeleton.open(calibration.directory, windows, calibration.device, calibration.dtype)
    calls = skeleton.record_calls(windows[:1])
    # Backwards: the finished blocks are the last ones.
    unfinished = next((i for i in range(len(calls)) if kept.file(i).is_file()), len(calls))
    with _spools(calibration, skeleton, len(calls)) as (inputs, slopes):
        backward = _Backward(calibration, skeleton, calls, inputs, slopes)
        if unfinished == len(calls):
            backward.through_tail(seed)
        for index in reversed(range(unfinished)):
            means = backward.through_block(index, wanted)
            slopes[index % 2].sync()
            _save(means, kept.file(index))
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

    def through_block(self, index: int, wanted: Container[str]) -> dict[str, Tensor]:
        """Turn the slope at a block's outputs into that at its inputs.

        Returns the mean of |∂L/∂w|, float32, by stored names.
        """
        windows, block = len(self.calibration.windows), self.skeleton.blocks[index]
        stored = self.skeleton.materialise(block, prefix=f"{self.skeleton.blocks_name}.{index}.")
        sums = _summed_gradients(block, {inside: name for inside, name in stored.items() if name in wanted})
        progress = _telling(self.calibration, _TAIL, 1.0, "backward").progress
        for number in range(windows):
            hidden = self.inputs.read(index * windows + number).to(self.calibration.device)
            slope = self.slopes[(index + 1) % 2].read(number).to(self.calibration.device)
            self.slopes[index % 2].write(number, _slope_at_inputs(self.calls[index], block, hidden, slope))
            done = (len(self.calls) - 1 - index + (number + 1) / windows) / len(self.calls)
            progress(done, f"block {index + 1} of {len(self.calls)}")
        block.to("meta")
        return {name: total / windows for name, total in sums.items()}


@torch.enable_grad()
def _slope_at_inputs(call: BlockCall, block: nn.Module, hidden: Tensor, slope: Tensor) -> Tensor:
    """From that at the outputs: both (1, tokens, hidden). The weights' gradients go to their hooks."""
    leaf = hidden.requires_grad_()
    torch.autograd.backward(call.run(block, leaf), slope)
    if leaf.grad is None:
        raise RuntimeError("the block does not depend on its inputs")
    return leaf.grad


def _summed_gradients(block: nn.Module, wanted: dict[str, str]) -> dict[str, Tensor]:
    """Sums, by stored names, that |∂L/∂w| is added to in every backward pass; no gradient is held longer than that."""
    sums: dict[str, Tensor] = {}

    def add(parameter: Tensor, total: Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad.abs_())
            parameter.grad = None

    for inside, name in wanted.items():
        parameter = block.get_parameter(inside).requires_grad_()
        total = sums[name] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda found, total=total: add(found, total)
        )
    return sums


def _save(means: dict[str, Tensor], file: Path) -> None:
    """Raises JobFailed when one is not finite."""
    for name, mean in means.items():
        if not torch.isfinite(mean).all():
            raise JobFailed(
                f"The gradient of {name} is NaN or infinite on the calibration text.",
                code="non_finite_gradients",
                hint="Check that the original gives sensible outputs in float32, or use a criterion without gradients.",
            )
    part = file.with_name("gradients-unfinished")
    # The order among weights needs no more than three digits.
    save_file({name: mean.to(torch.bfloat16).cpu().contiguous() for name, mean in means.items()}, part)
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(file)


def _telling(calibration: Calibration, begin: float, end: float, what: str) -> Calibration:
    """The same with progress from `begin` to `end`."""
    return replace(
        calibration,
        progress=lambda share, message: calibration.progress(
            begin + (end - begin) * share, f"{what}, {message}"
        ),
    )
