"""Find the scales of GGUF's block formats that lose least on the inputs a layer has.

What is minimised is Σ_j h_j (scale·code_j − low − w_j)² over a group, h_j = E[x_j²] of input j, as in llama.cpp's
importance matrix. For given codes that is a quadratic in scale and low with a closed optimum, so each start gives
codes, codes give an optimum, and the best of all starts is refined. Blocks of 256 then choose their float16 scales and
their groups' integers together, on those quadratics: 1/32 of the work of trying them on the weights.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.gguf_scales import (
    SMALLEST_HALF,
    BlockScales,
    Grid,
    as_half,
    concatenated,
    cut,
    encode,
    half,
)

_CHUNK_WEIGHTS = 2**17
_ROUNDS = 3
_LEAST_IMPORTANCE = 1e-4
_TINY = 1e-30


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + k * (last - first) / (count - 1) for k in range(count))


# Shares of a group's largest weight that its outermost code may stand for.
_FACTORS = {16: _evenly(0.6, 1.1, 16), 32: _evenly(0.75, 1.06, 14), 64: _evenly(0.85, 1.04, 10)}
_EIGHT_BITS = _evenly(0.97, 1.01, 5)
# Of what lets the largest group of a block have the largest integer.
_BLOCK_FACTORS = _evenly(0.86, 1.12, 14)
_LOW_FACTORS = _evenly(0.9, 1.1, 8)


def fit_blocks(weight: Tensor, importance: Tensor, grid: Grid, *, threads: int = 1) -> BlockScales:
    """Scales of a finite float32 weight (rows, columns) for inputs of the given importance (columns,)."""
    relative = importance / importance.mean().clamp(min=_TINY)
    weights = relative.clamp(min=_LEAST_IMPORTANCE).view(1, -1, grid.group)
    fit = {"centre": _fit_centred, "any": _fit_with_minimum, "negative": _fit_with_multipliers}[grid.lows]

    @torch.inference_mode()
    def fit_rows(rows: Tensor) -> BlockScales:
        return fit(rows.view(len(rows), -1, grid.group), weights, grid)

    chunk = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        return concatenated(list(pool.map(fit_rows, torch.split(weight.contiguous(), chunk))))


@dataclass(frozen=True)
class _Quadratic:
    """The error of groups as a function of scale s and low l: s²A − 2slB + l²C − 2sP + 2lQ + R; all (rows, groups)."""

    A: Tensor
    B: Tensor
    C: Tensor
    P: Tensor
    Q: Tensor
    R: Tensor

    @classmethod
    def of(cls, codes: Tensor, groups: Tensor, importance: Tensor) -> _Quadratic:
        """Codes and weights (rows, groups, group size), importance (1, groups, group size)."""
        weighted_codes, weighted = importance * codes, importance * groups
        return cls(
            A=(weighted_codes * codes).sum(2),
            B=weighted_codes.sum(2),
            C=importance.sum(2).expand(len(groups), -1),
            P=(weighted_codes * groups).sum(2),
            Q=weighted.sum(2),
            R=(weighted * groups).sum(2),
        )

    def error(self, scale: Tensor, low: Tensor) -> Tensor:
        """(rows, groups)."""
        return (
            scale * (scale * self.A - 2 * low * self.B - 2 * self.P)
            + low * (low * self.C + 2 * self.Q)
            + self.R
        )

    def best(self, *, negative: bool) -> tuple[Tensor, Tensor]:
        """Scale and low of the least error; `negative`: the minimum is at most zero."""
        determinant = (self.A - self.B * self.B / self.C).clamp(min=_TINY)
        scale = (self.P - self.Q * self.B / self.C) / determinant
        low = (scale * self.B - self.Q) / self.C
        if negative:
            alone = self.P / self.A.clamp(min=_TINY)
            scale, low = torch.where(low < 0, alone, scale), low.clamp(min=0)
        return scale, low

    def low_for(self, scale: Tensor) -> Tensor:
        """The best low under a given scale."""
        return (scale * self.B - self.Q) / self.C

    def scale_for(self, low: Tensor) -> Tensor:
        """The best scale under a given low."""
        return (self.P + low * self.B) / self.A.clamp(min=_TINY)


def _fit_centred(groups: Tensor, importance: Tensor, grid: Grid) -> BlockScales:
    """Q4_0, Q5_0, Q8_0, and Q6_K with its integers."""
    scale = _search_centred(groups, importance, grid)
    if grid.groups == 1:
        return BlockScales(grid, half(scale))
    blocks = cut(scale, grid.groups)
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2)
    best = BlockScales(grid, torch.ones_like(largest), None, torch.ones_like(scale))
    least = torch.full_like(largest, torch.inf)
    # The largest may take −128 or 127: a step of one in 127 matters little, so a few starts are enough.
    for limit in (-128.0, 127.0, -124.0, 121.0):
        d = half(largest / limit)
        multiplier = (blocks / d[..., None]).round().clamp(-128, 127)
        multiplier = torch.where(multiplier == 0, torch.ones_like(multiplier), multiplier).flatten(1)
        tried = BlockScales(grid, d, None, multiplier)
        error = _errors(groups, importance, tried)
        best, least = _better(best, least, tried, error)
    return best


def _search_centred(groups: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """The best scale of each group, of either sign: (rows, groups)."""
    middle = grid.levels // 2
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    base = half(largest / -middle)
    best, least = base, torch.full_like(base, torch.inf)
    for factor in _EIGHT_BITS if grid.levels == 256 else _FACTORS[grid.levels]:
        for sign in (1, -1):
            best, least = _try_centred(groups, importance, grid, (base * factor * sign, best, least))
    for _ in range(_ROUNDS - 1):
        best, least = _try_centred(groups, importance, grid, (best, best, least))
    return best


def _try_centred(
    groups: Tensor, importance: Tensor, grid: Grid, state: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Codes of a scale, and the scale that is best for those codes, if it beats the best so far."""
    scale, best, least = state
    scale = half(scale)
    middle = grid.levels // 2
    signed = (groups / scale[..., None]).round_().clamp_(-middle, middle - 1)
    weighted = importance * signed
    norm, product = (weighted * signed).sum(2), (weighted * groups).sum(2)
    refitted = torch.where(norm > 0, product / norm.clamp(min=_TINY), scale)
    # Up to a constant: s²·Σhq² − 2s·Σhqw, with the scale as it will be stored.
    refitted = half(refitted)
    error = refitted * (refitted * norm - 2 * product)
    better = error < least
    return torch.where(better, refitted, best), torch.where(better, error, least)


def _fit_with_minimum(groups: Tensor, importance: Tensor, grid: Grid) -> BlockScales:
    """Q4_1 and Q5_1."""
    scale, low = _search_ranges(groups, importance, grid)
    return BlockScales(grid, half(scale), as_half(-low))


def _search_ranges(groups: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The best scale and low of each group: (rows, groups) each."""
    negative = grid.lows == "negative"
    bottom, top = groups.amin(2), groups.amax(2)
    if negative:
        bottom = bottom.clamp(max=0)
    best_scale, best_low = half((top - bottom) / (grid.levels - 1)).abs(), -bottom
    least = torch.full_like(bottom, torch.inf)
    starts = [(f, g) for f in _FACTORS[grid.levels][::3] for g in _FACTORS[grid.levels][::3]]
    for shrink_bottom, shrink_top in [*starts, *[(0.0, 0.0)] * (_ROUNDS - 1)]:
        scale, low = best_scale, best_low
        if shrink_top:
            scale = (top * shrink_top - bottom * shrink_bottom) / (grid.levels - 1)
            low = -bottom * shrink_bottom
        scale = scale.clamp(min=SMALLEST_HALF)
        codes = encode(groups, scale[..., None], low[..., None], grid)
        quadratic = _Quadratic.of(codes, groups, importance)
        scale, low = quadratic.best(negative=negative)
        error = torch.where(scale > 0, quadratic.error(scale, low), torch.inf)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, low, best_low)
    return best_scale, best_low


def _fit_with_multipliers(groups: Tensor, importance: Tensor, grid: Grid) -> BlockScales:
    """Q4_K and Q5_K: integers chosen on the quadratics of the codes so far, codes found again, as long as it helps."""
    scale, low = _search_ranges(groups, importance, grid)
    codes = encode(groups, scale.clamp(min=SMALLEST_HALF)[..., None], low[..., None], grid)
    best, least = None, torch.empty(0)
    for _ in range(_ROUNDS):
        tried = _choose_integers(_Quadratic.of(codes, groups, importance), grid)
        error = _errors(groups, importance, tried)
        if best is None:
            best, least = tried, error
        best, least = _better(best, least, tried, error)
        codes = tried.codes(groups.flatten(1)).view_as(groups)
    return best if best is not None else tried


def _choose_integers(quadratic: _Quadratic, grid: Grid) -> BlockScales:
    """Float16 scales of the blocks and integers of their groups, together, for the least error of given codes."""
    scale, low = (values.clamp(min=SMALLEST_HALF) for values in quadratic.best(negative=True))
    top = grid.largest_multiplier
    largest = cut(scale, grid.groups).amax(2)
    best: BlockScales | None = None
    least = torch.empty(0)
    for factor in _BLOCK_FACTORS:
        d = half(largest * factor / top)
        multiplier = (scale / _spread(d, grid)).round().clamp(1, top)
        low = quadratic.low_for(_spread(d, grid) * multiplier).clamp(min=0)
        largest_low = cut(low, grid.groups).amax(2)
        for low_factor in _LOW_FACTORS:
            minimum = half(largest_low * low_factor / top)
            low_multiplier = (low / _spread(minimum, grid)).round().clamp(0, top)
            tried = BlockScales(grid, d, minimum, multiplier, low_multiplier)
            error = _block_error(quadratic, tried)
            if best is None:
                best, least = tried, error
            best, least = _better(best, least, tried, error)
    if best is None:
        raise ValueError("there are no candidates")
    for refined in (_refit_multipliers(quadratic, best), _refit_floats(quadratic, best)):
        best, least = _better(best, least, refined, _block_error(quadratic, refined))
    return best


def _refit_multipliers(quadratic: _Quadratic, scales: BlockScales) -> BlockScales:
    """The groups' integer scales that are best under the lows chosen."""
    d = _spread(scales.d, scales.grid)
    multiplier = (quadratic.scale_for(scales.low()) / d).round().clamp(1, scales.grid.largest_multiplier)
    return BlockScales(scales.grid, scales.d, scales.minimum, multiplier, scales.low_multiplier)


def _refit_floats(quadratic: _Quadratic, scales: BlockScales) -> BlockScales:
    """The blocks' two float16 numbers that are best under the integers chosen: a 2×2 system each."""
    sc, m = scales.multiplier, scales.low_multiplier
    if sc is None or m is None:
        raise ValueError("these blocks have no integers")
    a, b, c = (
        _sum(values, scales.grid)
        for values in (sc * sc * quadratic.A, sc * m * quadratic.B, m * m * quadratic.C)
    )
    p, q = _sum(sc * quadratic.P, scales.grid), _sum(m * quadratic.Q, scales.grid)
    c = torch.where(c > 0, c, torch.ones_like(c))
    d = (p - q * b / c) / (a - b * b / c).clamp(min=_TINY)
    minimum = ((d * b - q) / c).clamp(min=0)
    return scales.with_floats(d.clamp(min=SMALLEST_HALF), minimum)


def _block_error(quadratic: _Quadratic, scales: BlockScales) -> Tensor:
    """(rows, blocks)."""
    return _sum(quadratic.error(scales.scale(), scales.low()), scales.grid)


def _errors(groups: Tensor, importance: Tensor, scales: BlockScales) -> Tensor:
    """The error of each block with the codes nearest to its weights: (rows, blocks)."""
    weight = groups.flatten(1)
    difference = (scales.weights(scales.codes(weight)) - weight).view_as(groups)
    return _sum((importance * difference.square_()).sum(2), scales.grid)


def _better(
    best: BlockScales, least: Tensor, tried: BlockScales, error: Tensor
) -> tuple[BlockScales, Tensor]:
    """Block by block whichever has the lower error."""
    better = error < least
    wide = better.repeat_interleave(best.grid.groups, dim=1)

    def pick(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        if new is None or old is None:
            return None
        return torch.where(better if new.shape == better.shape else wide, new, old)

    d = torch.where(better, tried.d, best.d)
    rest = [
        pick(new, old)
        for new, old in (
            (tried.minimum, best.minimum),
            (tried.multiplier, best.multiplier),
            (tried.low_multiplier, best.low_multiplier),
        )
    ]
    return BlockScales(best.grid, d, *rest), torch.where(better, error, least)


def _sum(groups: Tensor, grid: Grid) -> Tensor:
    """(rows, groups) -> (rows, blocks)."""
    return cut(groups, grid.groups).sum(2)


def _spread(blocks: Tensor, grid: Grid) -> Tensor:
    """(rows, blocks) -> (rows, groups)."""
    return blocks.repeat_interleave(grid.groups, dim=1)
