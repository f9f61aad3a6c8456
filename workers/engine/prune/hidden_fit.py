"""Narrow a language model's blocks one after the other, each fitted to what the narrow blocks before it give.

Layers that read the states are given less than they were. What they were given is predicted from what they are given now
by one linear map for all of a place, which becomes part of their weights. Layers that add to the states are then
refitted so that the sum is nearest to the original's, told in the directions that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.spec.architectures import architecture_in
from app.spec.prune_hidden import ATTENTION_NORM, FEED_FORWARD_NORM, adds_one_to_gains, hidden_axis
from workers.engine.architectures.skeleton import BlockCall, set_parameter
from workers.engine.calibration.block_journal import BlockJournal
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.hidden_states import HiddenStates
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.selection import non_finite
from workers.engine.freed_memory import release_freed_memory
from workers.engine.prune.block_parts import PARTS, BlockPart, behind, given_to
from workers.engine.prune.hidden_directions import Directions, normed
from workers.engine.prune.least_squares import LeastSquares

_TINY = 1e-12


@dataclass(frozen=True)
class HeadSums:
    """What is known of the last norm's states x (hidden,) and the narrow model's z (width,) there."""

    gram: Tensor
    """Σ z zᵀ: (width, width)."""
    cross: Tensor
    """Σ z mᵀ of what is missing, m = x − reading z: (width, hidden)."""
    tokens: int


class HiddenFit:
    """The narrow model beside the original, a block of each in memory."""

    def __init__(
        self,
        calibration: Calibration,
        journal: BlockJournal,
        directions: Directions,
        narrow_model: Any,
        *,
        repair: bool,
    ) -> None:
        self._checkpoint = Checkpoint.open(calibration.directory)
        self._calibration, self._journal, self._repair = calibration, journal, repair
        self._directions = directions.on(calibration.device)
        self._blocks: nn.ModuleList = narrow_model.base_model.layers
        self._epsilon = float(narrow_model.config.rms_norm_eps)
        # Granite multiplies what is added.
        self._factor = float(getattr(narrow_model.config, "residual_multiplier", 1.0))
        self._one = 1.0 if adds_one_to_gains(architecture_in(self._checkpoint.config)) else 0.0
        self._call: BlockCall | None = None
        self._passed = 0
        self._lost: dict[int, float] = {}
        self._head = LeastSquares(has_bias=False)

    @torch.no_grad()
    def run(self) -> HeadSums:
        """Narrow all blocks that the journal does not have.

        Raises InvalidRequest for a weight that is not finite, JobFailed for such states.
        """
        stream_blocks(
            self._calibration,
            self._pass_on,
            prepare=self._narrow,
            finished=self._commit,
            first_block=self._journal.blocks_done,
        )
        kept = self._journal.kept("head")
        if kept is None:
            raise ValueError("the last block was never passed")
        return HeadSums(kept["gram"], kept["cross"], self._calibration.windows.numel())

    def _narrow(self, block: LiveBlock) -> None:
        self._call, self._passed, self._lost[block.index] = block.call, 0, 0.0
        self._forget_before(block.index)
        if block.index == 0:
            self._begin(block)
        for name in block.stored_names:
            self._put(block, name, self._cut(block, name))
        for part in PARTS if self._repair else ():
            self._refit_readers(block, part)
            # Experts are given some of the tokens each: they add what they did.
            if f"{part.writer}.weight" in block.stored_names:
                self._refit_writer(block, part)
        narrow = self._blocks[block.index]
        tensors = {
            stored: narrow.get_parameter(name).to(self._checkpoint.tensors[stored].dtype).cpu().contiguous()
            for name, stored in block.stored_names.items()
        }
        self._journal.put(block.index, tensors)

    def _begin(self, block: LiveBlock) -> None:
        """The narrow states that reach the first block."""
        start = 0
        with self._states(0) as states:
            for hidden in block.inputs():
                states.write(start, hidden @ self._directions.narrowing)
                start += len(hidden)

    def _cut(self, block: LiveBlock, name: str) -> Tensor:
        """A parameter of a block, turned and cut as it is."""
        weight = block.module.get_parameter(name).float()
        axis = hidden_axis(name)
        if not torch.isfinite(weight).all():
            raise non_finite(block.stored_names[name])
        if axis == 1:
            return self._read_by(block, name, self._directions.reading)
        if axis is None:
            return weight
        if name.partition(".")[0] in (ATTENTION_NORM, FEED_FORWARD_NORM):
            # Its gains are in the layers that read.
            return torch.full_like(weight[: self._directions.basis.shape[1]], 1 - self._one)
        return self._directions.narrowing.T @ weight

    def _read_by(self, block: LiveBlock, name: str, reading: Tensor) -> Tensor:
        """A layer of the original that is given the norm's gains, and what `reading` makes of narrow states."""
        part = next(part for part in PARTS if part.has(name))
        gains = block.module.get_parameter(f"{part.norm}.weight").float() + self._one
        return (block.module.get_parameter(name).float() * gains) @ reading

    def _put(self, block: LiveBlock, name: str, value: Tensor) -> None:
        """Give the narrow block a parameter, rounded as it is stored."""
        dtype = self._checkpoint.tensors[block.stored_names[name]].dtype
        set_parameter(self._blocks[block.index], name, value.to(dtype).float())

    def _refit_readers(self, block: LiveBlock, part: BlockPart) -> None:
        fit = LeastSquares(has_bias=False)
        for hidden, narrow in self._pairs(block):
            (given,) = given_to(block.module, block.call, hidden, [part.norm])
            (now,) = given_to(self._blocks[block.index], block.call, narrow, [part.norm])
            self._add_readable(fit, given, now)
        block.alive()
        reading = self._directions.reading + fit.solved()[0]
        for name in block.stored_names:
            if part.has(name) and hidden_axis(name) == 1:
                self._put(block, name, self._read_by(block, name, reading))

    def _add_readable(self, fit: LeastSquares, given: Tensor, now: Tensor) -> None:
        """Take in what is missing of normed states in what the narrow ones hold of them."""
        before, after = normed(given, self._epsilon), normed(now, self._epsilon)
        missing = before - after @ self._directions.reading.T
        fit.add(after, missing, torch.ones(len(after), device=after.device))

    def _refit_writer(self, block: LiveBlock, part: BlockPart) -> None:
        module = self._blocks[block.index]
        layer = module.get_submodule(part.writer)
        has_bias = f"{part.writer}.bias" in block.stored_names
        fit = LeastSquares(has_bias=has_bias)
        for hidden, narrow in self._pairs(block):
            aim = behind(block, part, hidden) @ self._directions.narrowing
            before, inputs = given_to(module, block.call, narrow, [part.norm, part.writer])
            missing = (aim - before) / self._factor - layer(inputs)
            # Norms divide by the length of a state, and a few tokens have states a hundred times as long as all others.
            weights = 1 / aim.square().sum(-1).clamp(min=_TINY)
            fit.add(inputs.flatten(0, -2), missing.flatten(0, -2), weights.flatten())
        block.alive()
        change, _ = fit.solved()
        if has_bias:
            self._move(block, f"{part.writer}.bias", change[:, -1])
            change = change[:, :-1]
        self._move(block, f"{part.writer}.weight", change)

    def _move(self, block: LiveBlock, name: str, change: Tensor) -> None:
        self._put(block, name, self._blocks[block.index].get_parameter(name) + change)

    def _pairs(self, block: LiveBlock) -> Iterator[tuple[Tensor, Tensor]]:
        """What reaches a block in the original and in the narrow model, some windows at a time."""
        start = 0
        with self._states(block.index) as states:
            for hidden in block.inputs():
                yield hidden, states.read(start, len(hidden)).to(hidden.device)
                start += len(hidden)

    def _pass_on(self, index: int, before: Tensor, after: Tensor) -> None:
        """Bring the narrow model past a block, and see how far it is from the original there."""
        if self._call is None:
            raise ValueError("a block is passed that was not narrowed")
        with self._states(index) as given, self._states(index + 1) as found:
            narrow = given.read(self._passed, len(before)).to(before.device)
            narrow = self._call.run(self._blocks[index], narrow)
            found.write(self._passed, narrow)
        self._passed += len(before)
        missing = after - narrow @ self._directions.reading.T
        shares = missing.square().sum(-1) / after.square().sum(-1).clamp(min=_TINY)
        self._lost[index] += float(shares.mean()) * len(before) / len(self._calibration.windows)
        if index + 1 == len(self._blocks):
            self._add_readable(self._head, after, narrow)

    def _commit(self, last: int) -> None:
        with self._states(last + 1) as states:
            states.sync()
        if last + 1 == len(self._blocks):
            gram, cross = self._head.sums()
            self._journal.keep("head", {"gram": gram.cpu(), "cross": cross.cpu()})
            self._forget_before(last + 1)
        for index in sorted(self._lost):
            self._journal.commit(index, {"lost": self._lost.pop(index)})

    def _states(self, block: int) -> HiddenStates:
        """What reaches a block in the narrow model."""
        windows, tokens = self._calibration.windows.shape
        path = self._journal.directory / f"narrow-{block:05d}"
        return HiddenStates(path, windows, (tokens, self._directions.basis.shape[1]), torch.float32)

    def _forget_before(self, block: int) -> None:
        """Give back the block before, and the states but for those that a killed job would go on from."""
        if block > 0:
            self._blocks[block - 1].to("meta")
            release_freed_memory()
        for file in self._journal.directory.glob("narrow-*"):
            number = int(file.name.removeprefix("narrow-"))
            if number < block and number != self._journal.blocks_done:
                file.unlink()
