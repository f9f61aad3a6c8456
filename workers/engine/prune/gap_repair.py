"""Make up for removed blocks in the last layer before them, by least squares.

Idea: blocks add to the stream that passes through them. What the blocks of a gap would have added is predicted from
the inputs of the layer before the gap whose outputs are added to that same stream, and the prediction is added to its
weights: no new layer, and nothing to train. With several gaps the states of the original are the aim behind each.
A token counts by the inverse square of its state's size, since norms divide by that and a few tokens have states a
hundred times as large as all others (Sun et al. 2024, "Massive Activations").
Paper: Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
where a linear map of the layer's outputs is fitted; the layer's inputs are more, and hold those maps.
Left out: refitting the blocks after the gap too. On SmolLM2 and 16,384 tokens that made states more alike and the
perplexity worse.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from app.spec.architectures import architecture_in
from app.spec.feed_forward import last_layer_of
from workers.engine.architectures.skeleton import BlockCall
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.hidden_states import HiddenStates
from workers.engine.checkpoint import Checkpoint
from workers.engine.prune.least_squares import LeastSquares

# Windows of the student that are run at once.
_AT_ONCE = 4
_TINY = 1e-12


@dataclass(frozen=True)
class GapRepair:
    """What the layers before the gaps became."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """As they are to be stored, by their names in the checkpoint."""
    errors: list[tuple[float, float]] = field(default_factory=list)
    """For each gap ‖student − original‖² / ‖original‖² behind it, mean over tokens, before and after, on the same text."""

    @property
    def metrics(self) -> dict[str, float | None]:
        """The mean of the errors before and after."""
        before, after = (
            sum(error[side] for error in self.errors) / len(self.errors) if self.errors else None
            for side in (0, 1)
        )
        return {"gap_error_before_repair": before, "gap_error_after_repair": after}


@torch.no_grad()
def repaired(calibration: Calibration, dropped: Collection[int]) -> GapRepair:
    """Refit the last layer before each gap that the blocks in `dropped` leave, one block in memory beside the one held.

    Nothing stands before a gap at the beginning, which stays. The spool directory needs half as much again as
    `Calibration` says. Raises JobFailed when the model's activations are not finite.
    """
    checkpoint = Checkpoint.open(calibration.directory)
    before_gaps = [index - 1 for index in sorted(dropped) if index and index - 1 not in dropped]
    if not before_gaps:
        return GapRepair()
    last = before_gaps[-1] + 1
    while last + 1 in dropped:
        last += 1
    with ExitStack() as stack:
        walk = _Walk(calibration, checkpoint, frozenset(dropped), stack)
        stream_blocks(calibration, walk.compare, prepare=walk.prepare, last_block=last)
        walk.close_gap()
    return walk.repair


@dataclass
class _Held:
    """A block before a gap, kept until it is seen what is missing behind it."""

    module: nn.Module
    call: BlockCall
    names: dict[str, str]
    """Names in the checkpoint by those within the block."""
    gap_end: int
    fit: LeastSquares


class _Walk:
    """The student's states beside the original's, from the first gap on."""

    def __init__(
        self, calibration: Calibration, checkpoint: Checkpoint, dropped: frozenset[int], stack: ExitStack
    ) -> None:
        self._calibration, self._checkpoint, self._dropped, self._stack = (
            calibration,
            checkpoint,
            dropped,
            stack,
        )
        architecture = architecture_in(checkpoint.config)
        layer = last_layer_of(architecture)
        if layer is None:
            raise ValueError(f"no layer of {architecture.name} can make up for missing blocks")
        self._layer, self._inputs_first = layer, architecture.inputs_first
        # Granite multiplies what is added.
        self._factor = float(checkpoint.config.get("residual_multiplier", 1.0))
        self._states: HiddenStates | None = None
        self._held: _Held | None = None
        self._compared = 0
        self.repair = GapRepair()

    def prepare(self, block: LiveBlock) -> None:
        """Bring the student to this block, or past it."""
        if self._states is None and {block.index, block.index + 1} & self._dropped:
            self._states = self._spooled(block)
        if block.index in self._dropped:
            return
        self.close_gap()
        if block.index + 1 in self._dropped:
            self._held = self._hold(block)
        elif self._states is not None:
            self._advance(block.module, block.call)

    def compare(self, index: int, _before: Tensor, after: Tensor) -> None:
        """See what is missing behind the gap that ends with this block: the original's states there, a few windows."""
        held, states = self._held, self._states
        if held is None or states is None or index != held.gap_end:
            return
        for start in range(0, len(after), _AT_ONCE):
            aim = after[start : start + _AT_ONCE].flatten(0, 1).float()
            hidden = states.read(self._compared, min(_AT_ONCE, len(after) - start)).to(after.device)
            inputs, output = self._run_seeing_inputs(held, hidden)
            weights = 1 / aim.square().sum(1).clamp(min=_TINY)
            held.fit.add(inputs, (aim - output.flatten(0, 1).float()) / self._factor, weights)
            self._compared += len(hidden)

    def close_gap(self) -> None:
        """Refit the block that is held, if there is one, and bring the student past it."""
        held = self._held
        if held is None:
            return
        change, left = held.fit.solved()
        scale = self._factor**2 / held.fit.tokens
        self.repair.errors.append((scale * held.fit.missing, scale * left))
        if held.fit.has_bias:
            self._put(held, "bias", change[:, -1])
            change = change[:, :-1]
        self._put(held, "weight", change.T if self._inputs_first else change)
        self._advance(held.module, held.call)
        self._held, self._compared = None, 0

    def _hold(self, block: LiveBlock) -> _Held:
        end = block.index + 1
        while end + 1 in self._dropped:
            end += 1
        has_bias = f"{self._layer}.bias" in block.stored_names
        fit = LeastSquares(has_bias=has_bias)
        return _Held(copy.deepcopy(block.module), block.call, block.stored_names, end, fit)

    def _put(self, held: _Held, part: str, change: Tensor) -> None:
        name = f"{self._layer}.{part}"
        stored, parameter = held.names[name], held.module.get_parameter(name)
        value = (parameter.float() + change).to(self._checkpoint.tensors[stored].dtype)
        self.repair.tensors[stored] = value.cpu().contiguous()
        parameter.copy_(value)

    def _run_seeing_inputs(self, held: _Held, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer is given, (tokens, features), and what leaves the block, (windows, tokens, hidden)."""
        seen: list[Tensor] = []

        def look(_layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])

        handle = held.module.get_submodule(self._layer).register_forward_pre_hook(look)
        try:
            output = held.call.run(held.module, hidden)
        finally:
            handle.remove()
        return seen[0].flatten(0, -2), output

    def _spooled(self, block: LiveBlock) -> HiddenStates:
        """The states that reach a block, which are the student's too up to there."""
        shape, spool = tuple(block.window(0).shape[1:]), self._calibration.spool_directory
        states = HiddenStates(spool / "student", block.windows, shape, self._calibration.dtype)
        self._stack.enter_context(states)
        number = 0
        for hidden in block.inputs():
            states.write(number, hidden)
            number += len(hidden)
        return states

    def _advance(self, module: nn.Module, call: BlockCall) -> None:
        states, windows = self._states, len(self._calibration.windows)
        if states is None:
            return
        for start in range(0, windows, _AT_ONCE):
            hidden = states.read(start, min(_AT_ONCE, windows - start)).to(self._calibration.device)
            states.write(start, call.run(module, hidden))
