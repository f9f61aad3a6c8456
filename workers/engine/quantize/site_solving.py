"""Solve the layers of one input after the other, or of several inputs at once, each on a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.engine.calibration.device_shares import current_device
from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.layer_fit import LayerFit


@dataclass(frozen=True)
class SiteProblem:
    """The layers of one input, and what is known of it."""

    stored: dict[str, str]
    """Their weights' names in the checkpoint by the layers' names in the block."""
    weights: dict[str, Tensor]
    """By those names."""
    second_moment: Tensor
    mean: Tensor
    input_peak: float

    def on(self, device: str) -> SiteProblem:
        """What solving takes of it, on another device."""
        weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return replace(self, weights=weights, second_moment=self.second_moment.to(device))


@dataclass(frozen=True)
class SiteSolution:
    """What was found for the layers of an input."""

    fits: dict[str, LayerFit]
    """By the names of their weights."""
    warnings: list[str]

    def on(self, device: torch.device) -> SiteSolution:
        """The same on another device."""
        return replace(self, fits={name: fit.on(device) for name, fit in self.fits.items()})


def solve_at_once(
    problems: Sequence[SiteProblem], solve: Callable[[SiteProblem], SiteSolution], devices: Sequence[str]
) -> list[SiteSolution]:
    """Solutions in the order of the problems and on their device; they are dealt out to the devices in turns."""

    @torch.no_grad()
    def solve_on(device: str, own: Sequence[SiteProblem]) -> list[SiteSolution]:
        with current_device(device):
            return [solve(problem.on(device)).on(problem.second_moment.device) for problem in own]

    count = len(devices)
    # The number of torch's threads is one for all of ours.
    with one_torch_thread(), ThreadPoolExecutor(count) as pool:
        dealt = [problems[number::count] for number in range(count)]
        found = list(pool.map(solve_on, devices, dealt))
    return [found[number % count][number // count] for number in range(len(problems))]
