"""Scales and zero points that make most weights' errors small and let a few be large, without data.

Idea: minimise Σ |w − s·(q − z)|^p with p < 1 by half-quadratic splitting: an error e of its own for each weight takes up
what is worth leaving (a shrinkage), and scale and zero point are fitted to w − e by least squares.
Paper: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (HQQ), eqs. 3-6.
Unlike there, zero points are integers, as the files have them, so the scale moves as well; several clipped ranges are
started from, since none is reached from the full one; errors are in steps of the grid, so β means the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.quantize.grid import Fit, WeightGrid, divisor

_POWER = 0.7
_FIRST_BETA = 10.0
_BETA_GROWTH = 1.01
_ITERATIONS = 8
_STARTS = (1.0, 0.9, 0.8, 0.7, 0.6)


def fit_half_quadratic(groups: Tensor, grid: WeightGrid, stored: torch.dtype) -> Fit:
    """Choose scale and zero point of each group of finite float32 weights (…, group size), and encode them."""
    whole, first_zero = grid.start(groups)
    scale, zero = grid.stored(whole, stored), first_zero
    best = _lost(groups, scale, zero, grid)
    for factor in _STARTS:
        tried = grid.stored(whole * factor, stored), first_zero
        for iteration in range(_ITERATIONS):
            better = (lost := _lost(groups, *tried, grid)) < best
            scale, zero, best = (
                torch.where(better, new, old)
                for new, old in zip((*tried, lost), (scale, zero, best), strict=True)
            )
            tried = _refitted(groups, *tried, grid, stored, beta=_FIRST_BETA * _BETA_GROWTH**iteration)
    codes = _codes(groups, scale, zero, grid)
    errors = (codes - zero) * scale - groups
    return Fit(scale, zero, codes, errors.square_().sum(-1, keepdim=True))


def shrunk(errors: Tensor, beta: float) -> Tensor:
    """sign(x)·max(0, |x| − |x|^(p − 1)/β): the error that is left to a weight, of any shape."""
    sizes = errors.abs()
    kept = (sizes - sizes.clamp(min=torch.finfo(errors.dtype).tiny).pow(_POWER - 1) / beta).clamp_(min=0)
    return kept.mul_(errors.sign())


def _refitted(
    groups: Tensor, scale: Tensor, zero: Tensor, grid: WeightGrid, stored: torch.dtype, *, beta: float
) -> tuple[Tensor, Tensor]:
    codes = _codes(groups, scale, zero, grid)
    exact = groups / scale
    wanted = exact - shrunk(exact - (codes - zero), beta)
    if not grid.symmetric:
        zero = grid.clamp_zero((codes - wanted).mean(-1, keepdim=True).round())
    levels = codes - zero
    norm = levels.square().sum(-1, keepdim=True)
    return grid.stored(scale * (wanted * levels).sum(-1, keepdim=True) / divisor(norm), stored), zero


def _codes(groups: Tensor, scale: Tensor, zero: Tensor, grid: WeightGrid) -> Tensor:
    return grid.nearest_(torch.addcmul(zero, groups, scale.reciprocal()))


def _lost(groups: Tensor, scale: Tensor, zero: Tensor, grid: WeightGrid) -> Tensor:
    """Σ |w − s·(q − z)|^p of each group: (…, 1)."""
    restored = (_codes(groups, scale, zero, grid) - zero).mul_(scale)
    return restored.sub_(groups).abs_().pow_(_POWER).sum(-1, keepdim=True)
