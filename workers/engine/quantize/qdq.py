"""Static int8: ranges of activations from calibration text, channels smoothed, weights rounded with compensation.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for LLMs", eq. 4: the inputs of a layer
are divided by s_j = max|x_j|^α / max|w_j|^(1−α), channel by channel, and its weights multiplied by it; then one scale
spans all channels with less loss. Ranges with the least squared error: `activation_ranges.py`. What follows a block in
calibration is given the block's outputs with rounded weights and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.engine.calibration.activation_ranges import (
    Extremes,
    input_extremes,
    input_histograms,
    least_error_range,
)
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.checkpoint.selection import module_name, non_finite
from workers.engine.export.onnx_qdq import LEVELS, InputGrid, Int8Matrix
from workers.engine.quantize.compensation import ColumnGrid, compensated_codes
from workers.engine.quantize.sites import block_sites, factor_of_site
from workers.engine.quantize.solutions import Solutions

_HALF = 128


@dataclass(frozen=True)
class _Site:
    """An input, the layers that share it, and what was seen of it."""

    names: list[str]
    stored: list[str]
    second_moment: Tensor
    extremes: Extremes
    smoothing: Tensor
    """(features,): ones where nothing is smoothed."""


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
        """Quantize the wanted layers of a block. Raises InvalidRequest for weights that are not finite."""
        names = [module_name(name) for name, stored in block.stored_names.items() if stored in self.wanted]
        with input_extremes(block.module, iter(names)) as extremes:
            found = [(site.layers, stored, site.second_moment()) for site, stored in block_sites(block, self.wanted)]  # fmt: skip
        sites = [
            _Site(
                layers,
                stored,
                moment,
                extremes[layers[0]],
                self._smoothing(block.module, layers, stored, extremes[layers[0]]),
            )
            for layers, stored, moment in found
        ]
        for site, (low, high) in zip(sites, self._ranges(block, sites), strict=True):
            smoothing = site.smoothing.cpu().numpy().astype(np.float32) if self.smoothing else None
            self._solve_site(block.module, site, InputGrid.spanning(low, high, smoothing))

    def _smoothing(
        self, module: nn.Module, layers: list[str], stored: list[str], extremes: Extremes
    ) -> Tensor:
        weights = [module.get_parameter(f"{name}.weight") for name in layers]
        for name, weight in zip(stored, weights, strict=True):
            if not torch.isfinite(weight).all():
                raise non_finite(name)
        return smoothing_factors(extremes.largest, weights, self.smoothing)

    def _ranges(self, block: LiveBlock, sites: list[_Site]) -> list[tuple[float, float]]:
        whole = {site.names[0]: site.extremes.divided(site.smoothing).ends() for site in sites}
        spans = {name: ends for name, ends in whole.items() if ends[0] < ends[1]}
        if not self.clips or not spans:
            return list(whole.values())
        scales = {site.names[0]: site.smoothing for site in sites if site.names[0] in spans}
        counts = input_histograms(block.module, scales, spans, block.run)
        clipped = {
            name: least_error_range(counts[name], *ends, levels=LEVELS) for name, ends in spans.items()
        }
        return list((whole | clipped).values())

    def _solve_site(self, module: nn.Module, site: _Site, grid: InputGrid) -> None:
        moment = site.second_moment / torch.outer(site.smoothing, site.smoothing)
        factor = factor_of_site(moment, site.stored, self.damping, self.solutions.warnings)
        for name, stored in zip(site.names, site.stored, strict=True):
            parameter = module.get_parameter(f"{name}.weight")
            weight = parameter * site.smoothing
            columns = row_grid(weight)
            codes = (
                nearest_codes(weight, columns)
                if factor is None
                else compensated_codes(weight * (moment.diagonal() != 0), factor, columns, threads=self.threads)
            )  # fmt: skip
            restored = codes * columns.scale
            matrix = Int8Matrix(
                codes.to(torch.int8).cpu().numpy(), columns.scale[:, 0].cpu().numpy().copy(), grid
            )
            self.solutions.add(stored, matrix, weight, restored, moment)
            parameter.copy_(restored / site.smoothing)
            module.get_submodule(name).register_forward_pre_hook(_rounding(grid, site.smoothing))


def smoothing_factors(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """s of SmoothQuant: largest |x| per channel (K,), weights (N, K) that share the input -> (K,), ones for α = 0."""
    if strength == 0:
        return torch.ones_like(largest)
    weight_largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    known = (largest > 0) & (weight_largest > 0)
    factors = largest.clamp(min=1e-5) ** strength / weight_largest.clamp(min=1e-5) ** (1 - strength)
    return torch.where(known, factors, torch.ones_like(factors))


def row_grid(weight: Tensor) -> ColumnGrid:
    """Symmetric int8 with one positive scale per row: readers of QDQ expect no other. (rows, columns), float32."""
    peak = weight.abs().amax(1, keepdim=True)
    scale = torch.where(peak > 0, peak, torch.ones_like(peak)) / (_HALF - 1)
    group_of = torch.zeros(weight.shape[1], dtype=torch.long, device=weight.device)
    return ColumnGrid(scale, torch.zeros_like(scale), group_of, _HALF)


def nearest_codes(weight: Tensor, grid: ColumnGrid) -> Tensor:
    """Codes without compensation."""
    return torch.round(weight / grid.scale).clamp(-grid.half, grid.half - 1)


def _rounding(
    grid: InputGrid, smoothing: Tensor
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor, ...]]:
    """A hook that gives a layer the inputs that a user's runtime will give it."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        codes = torch.round(inputs[0] / (smoothing * grid.scale)) + grid.zero
        return ((codes.clamp(0, LEVELS) - grid.zero) * (smoothing * grid.scale),)

    return hook
