"""The ranges of what linear layers are given, channel by channel and as histograms, and which part of them to keep.

An activation is clipped to [low, high] and rounded to one of `levels` + 1 points. Rounding noise is uniform, step² / 12
in the mean; what is clipped loses its distance to the range. The pair of ends with the least sum of both wins
(Sung et al. 2015, "Resiliency of deep neural networks under quantization", L2 error minimisation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BINS = 2048
_KEPT = tuple(1 - k / 64 for k in range(60))


@dataclass(frozen=True)
class Extremes:
    """Smallest and largest value of each channel over all tokens seen: (features,) each."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """Largest absolute value of each channel."""
        return torch.maximum(self.high, -self.low)

    def divided(self, scale: Tensor) -> Extremes:
        """Those of the inputs divided by a positive scale per channel."""
        return Extremes(self.low / scale, self.high / scale)

    def ends(self) -> tuple[float, float]:
        """Over all channels, zero included."""
        return min(0.0, float(self.low.min())), max(0.0, float(self.high.max()))


@contextmanager
def input_extremes(block: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Extremes]]:
    """Watch the inputs of layers, by name, while the block runs inside the context."""
    seen: dict[str, Extremes] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            low, high = rows.amin(0), rows.amax(0)
            if name in seen:
                low, high = torch.minimum(low, seen[name].low), torch.maximum(high, seen[name].high)
            seen[name] = Extremes(low, high)

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def input_histograms(
    block: nn.Module,
    scales: Mapping[str, Tensor],
    ends: Mapping[str, tuple[float, float]],
    run: Callable[[], None],
) -> dict[str, Tensor]:
    """Run the block and count the inputs of layers, divided by scales (features,), in BINS between ends: (BINS,) each."""
    counts = {name: torch.zeros(BINS) for name in scales}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].float() / scales[name]
            counts[name] += torch.histc(values, BINS, *ends[name]).cpu()

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(look(name)) for name in scales]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def least_error_range(counts: Tensor, low: float, high: float, *, levels: int) -> tuple[float, float]:
    """Both ends, each moved towards zero, with the least squared error: counts (BINS,) between low ≤ 0 ≤ high."""
    width = (high - low) / BINS
    centres = low + width * (torch.arange(BINS) + 0.5)
    lows = low * torch.tensor(_KEPT if low < 0 else (1.0,))
    highs = high * torch.tensor(_KEPT if high > 0 else (1.0,))
    below = _clipped(counts, -centres, -lows)
    above = _clipped(counts, centres, highs)
    steps = (highs[None, :] - lows[:, None]) / levels
    errors = below[:, None] + above[None, :] + counts.double().sum() * steps.double().square() / 12
    best = int(errors.argmin())
    return float(lows[best // len(highs)]), float(highs[best % len(highs)])


def _clipped(counts: Tensor, values: Tensor, limits: Tensor) -> Tensor:
    """Squared distance beyond each limit, summed over what is beyond it: (bins,), (bins,), (limits,) -> (limits,)."""
    beyond = (values[None, :] - limits[:, None]).clamp(min=0).double()
    return (beyond.square() * counts.double()).sum(dim=1)
