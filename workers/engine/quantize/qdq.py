"""Static int8: ranges of activations from calibration text, channels smoothed, weights rounded with compensation.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for LLMs", eq. 4: the inputs of a layer
are divided by s_j = max|x_j|^α / max|w_j|^(1−α), channel by channel, and its weights multiplied by it; then one scale
spans all channels with less loss. Ranges with the least squared error: `activation_ranges.py`. What follows a block in
calibration is given the block's outputs with rounded weights and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.engine.calibration.activation_ranges import input_histograms, least_error_range
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.export.onnx_qdq import LEVELS, InputGrid, Int8Matrix
from workers.engine.quantize.compensation import compensated, factor_or_none
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit
from workers.engine.quantize.sites import Site, block_sites
from workers.engine.quantize.solutions import Solutions

_GRID = Grid(8, symmetric=True)


class QdqSolver:
    """Quantizes weights and inputs block after block."""

    def __init__(
        self, wanted: frozenset[str], *, smoothing: float, clips: bool, damping: float, threads: int
    ) -> None:
        """`clips`: whether ranges may leave out extreme values."""
        self.wanted = wanted
        self.smoothing = smoothing
        self.clips = clips
        self.damping = damping
        self.threads = threads
        self.solutions = Solutions[Int8Matrix]()

    def solve_block(self, block: LiveBlock) -> None:
        """Quantize the wanted layers of a block, and let it compute as a user's runtime will."""
        sites = block_sites(block, self.wanted)
        factors = [
            smoothing_factors(site.extremes.largest, list(site.weights.values()), self.smoothing)
            for site in sites
        ]
        ranges = self._ranges(block, sites, factors)
        for site, smoothing, (low, high) in zip(sites, factors, ranges, strict=True):
            stored = smoothing.cpu().numpy().astype(np.float32) if self.smoothing else None
            self._solve_site(block.module, site, smoothing, InputGrid.spanning(low, high, stored))

    def _ranges(
        self, block: LiveBlock, sites: list[Site], factors: list[Tensor]
    ) -> list[tuple[float, float]]:
        smoothings = {site.names[0]: factor for site, factor in zip(sites, factors, strict=True)}
        whole = {site.names[0]: site.extremes.divided(smoothings[site.names[0]]).ends() for site in sites}
        spans = {name: ends for name, ends in whole.items() if ends[0] < ends[1]}
        if not self.clips or not spans:
            return list(whole.values())
        counts = input_histograms(block.module, {name: smoothings[name] for name in spans}, spans, block.run)
        clipped = {
            name: least_error_range(counts[name], *ends, levels=LEVELS) for name, ends in spans.items()
        }
        return list((whole | clipped).values())

    def _solve_site(self, module: nn.Module, site: Site, smoothing: Tensor, grid: InputGrid) -> None:
        moment = site.second_moment / torch.outer(smoothing, smoothing)
        self.solutions.silent.look_at_inputs(list(site.weights), moment.diagonal())
        names = ", ".join(site.weights)
        factor = factor_or_none(moment, self.damping, names, self.solutions.warnings)
        for name, (stored, parameter) in zip(site.names, site.weights.items(), strict=True):
            weight = parameter * smoothing
            # What multiplies an input that is always zero would only be compensated for.
            fit = nearest_rows(weight * (moment.diagonal() != 0))
            if factor is not None:
                fit = compensated(weight * (moment.diagonal() != 0), factor, fit, threads=self.threads)
            scales = fit.scale[:, 0].cpu().numpy().copy()
            matrix = Int8Matrix(fit.codes.to(torch.int8).cpu().numpy(), scales, grid)
            self.solutions.add(stored, matrix, weight, fit.restored(), moment)
            parameter.copy_(fit.restored() / smoothing)
            module.get_submodule(name).register_forward_pre_hook(_rounding(grid, smoothing))


def smoothing_factors(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """s of SmoothQuant: largest |x| per channel (K,), weights (N, K) that share the input -> (K,), ones for α = 0."""
    if strength == 0:
        return torch.ones_like(largest)
    weight_largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    known = (largest > 0) & (weight_largest > 0)
    factors = largest.clamp(min=1e-5) ** strength / weight_largest.clamp(min=1e-5) ** (1 - strength)
    return torch.where(known, factors, torch.ones_like(factors))


def nearest_rows(weight: Tensor) -> LayerFit:
    """Symmetric int8 with one positive scale per row: readers of QDQ expect no other. (rows, columns), float32."""
    peak = weight.abs().amax(1, keepdim=True)
    scale = torch.where(peak > 0, peak, torch.ones_like(peak)) / (_GRID.half - 1)
    fit = LayerFit(_GRID, torch.float32, scale, torch.zeros_like(scale), torch.zeros_like(weight))
    return replace(fit, codes=_GRID.nearest_(weight / scale))


def _rounding(
    grid: InputGrid, smoothing: Tensor
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor, ...]]:
    """A hook that gives a layer the inputs that a user's runtime will give it."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        codes = torch.round(inputs[0] / (smoothing * grid.scale)) + grid.zero
        return ((codes.clamp(0, LEVELS) - grid.zero) * (smoothing * grid.scale),)

    return hook
