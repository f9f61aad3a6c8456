"""Train the codes of a block's layers so that the quantized block gives what the original gave.

Idea: what a solver finds layer by layer is the start; then a few dozen steps by the sign of the gradient of the block's
own error ‖block_q(x) − block(x)‖² move the codes that are in doubt, across layers. The better of start and end is kept.
Paper: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (SignRound).
Unlike there, the start is the solver's codes with each weight where it would best be alone; started from the original
weights' distance to those codes, 50 steps gained nothing (stories15m, 4 bits). The scales stay: trained too, they
lowered the blocks' errors and not the model's.
Memory: the block's weights, their latents and gradients, and one window's activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from app.spec.step_costs import TUNING_WINDOWS_PER_STEP
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.hidden_states import HiddenStates
from workers.engine.quantize.held_zeros import held_zeros
from workers.engine.quantize.layer_fit import LayerFit
from workers.engine.quantize.sign_rounding import codes_of, latent_signs, rates

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Untuned:
    """A layer as a solver left it."""

    fit: LayerFit
    latent: Tensor
    """Where each weight would best be alone, in steps of the grid and at most half of one from its code: (rows, columns);
    training moves it in place."""
    original: Tensor
    """The weight before it was quantized: (rows, columns)."""


@dataclass(frozen=True)
class Tuned:
    """What came of a block."""

    fits: dict[str, LayerFit]
    """By the layers' names in the block."""
    error_before: float
    """Mean square of the difference of the outputs, over all windows."""
    error_after: float


@contextmanager
def original_outputs(block: LiveBlock) -> Iterator[HiddenStates]:
    """What the block as it is gives for each window, in a file for as long as the context lasts."""
    path = block.scratch / "originals"
    first = block.window(0)
    try:
        with HiddenStates(path, block.windows, tuple(first.shape[1:]), first.dtype) as states:
            start = 0
            for hidden in block.inputs():
                states.write(start, block.call.run(block.module, hidden))
                start += len(hidden)
            yield states
    finally:
        path.unlink(missing_ok=True)


def tune_block(
    block: LiveBlock, originals: HiddenStates, layers: dict[str, Untuned], *, steps: int, seed: int
) -> Tuned:
    """Tune a block that holds the layers' restored weights, and leave it with those of the result.

    `layers` by their names in the block. The same seed gives the same result.
    """
    training = {name: _Training.of(layer, block.module, name) for name, layer in layers.items()}
    before = _error(block, originals)
    numbers = _shuffled(block.windows, torch.Generator().manual_seed(seed))
    for rate in rates(steps):
        with torch.enable_grad():
            for number in islice(numbers, TUNING_WINDOWS_PER_STEP):
                _loss(block, originals, number).backward()  # type: ignore[no-untyped-call]
        for layer in training.values():
            layer.step(rate)
        block.alive()
    for layer in training.values():
        layer.parameter.requires_grad_(False)
    after = _error(block, originals)
    if after < before:
        return Tuned({name: layer.fit for name, layer in training.items()}, before, after)
    for name, layer in training.items():
        fit = layers[name].fit
        layer.parameter.copy_(fit.restored().to(fit.dtype))
    return Tuned({name: layer.fit for name, layer in layers.items()}, before, before)


def _loss(block: LiveBlock, originals: HiddenStates, number: int) -> Tensor:
    """The mean square of what the block's output for a window is off."""
    hidden = block.window(number)
    target = originals.read(number).to(hidden.device)
    return nn.functional.mse_loss(block.call.run(block.module, hidden).float(), target.float())


def _error(block: LiveBlock, originals: HiddenStates) -> float:
    """The same over all windows."""
    return sum(float(_loss(block, originals, number)) for number in range(block.windows)) / block.windows


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """All numbers below `count` in random order, again and again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@dataclass
class _Training:
    """A layer whose codes move; its weight in the block moves with them."""

    parameter: nn.Parameter
    fit: LayerFit
    latent: Tensor
    """(rows, columns), in steps of the grid."""
    held: Tensor | None
    """(rows, columns), bool: pruned weights, which keep their codes."""

    @classmethod
    def of(cls, layer: Untuned, module: nn.Module, name: str) -> _Training:
        parameter = module.get_parameter(f"{name}.weight")
        parameter.requires_grad_(True)
        fit = replace(layer.fit, codes=layer.fit.codes.clone())
        return cls(parameter, fit, layer.latent, held_zeros(layer.original))

    def step(self, rate: float) -> None:
        """Move the latents by `rate` steps of the grid against the gradient, and the codes with them."""
        if self.parameter.grad is None:
            # An expert that none of the step's tokens were sent to.
            return
        for rows in row_parts(len(self.latent)):
            part = self.fit.of_rows(rows)
            self.latent[rows].sub_(latent_signs(part, self.parameter.grad[rows]), alpha=rate)
            codes = codes_of(part, self.latent[rows]).to(part.codes.dtype)
            if self.held is not None:
                codes = torch.where(self.held[rows], part.codes, codes)
            part.codes.copy_(codes)
            self.parameter[rows] = part.restored().to(self.fit.dtype).to(self.parameter.dtype)
        self.parameter.grad = None


def row_parts(rows: int) -> Iterator[slice]:
    """A few rows at a time: what is needed of a layer for a moment stays small."""
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield slice(start, start + _ROWS_AT_ONCE)
