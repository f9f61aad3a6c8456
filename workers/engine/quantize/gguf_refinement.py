"""Round to GGUF's blocks with compensation, then find the scales and codes that are best on the inputs as a whole.

With codes fixed, a row of the weight is linear in its float16 scales and minimums θ: ŵ = Σ_k θ_k φ_k, and
(w − ŵ) H (w − ŵ)ᵀ is least where (Φ H Φᵀ) θ = Φ H w. With scales fixed, each code in turn is moved to where the error
of the row, given all others, is least: coordinate descent. Both only ever lower the error.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.compensation import Factor, compensated, row_errors
from workers.engine.quantize.gguf_scales import BlockScales, concatenated
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit
from workers.engine.quantize.refinement import descended

_RIDGE = 1e-3
_ROWS_AT_ONCE = 768


@dataclass(frozen=True)
class Encoded:
    """A weight in blocks."""

    codes: Tensor
    """(rows, columns), float32, from 0."""
    scales: BlockScales

    def weights(self) -> Tensor:
        """What they stand for: (rows, columns), float32."""
        return self.scales.weights(self.codes)


def encode_compensated(
    weight: Tensor, scales: BlockScales, factor: Factor, moments: Tensor, *, threads: int
) -> Encoded:
    """Round a weight (rows, columns) with compensation under given scales, then improve scales and codes in turns.

    `moments` are damped as those that were factored.
    """
    middle = scales.grid.levels // 2
    rounded = compensated(weight, factor, _as_fit(scales.codes(weight), scales), threads=threads)
    scales = refit_scales(weight, rounded.codes + middle, scales, moments, threads=threads)
    start = _as_fit(rounded.codes + middle, scales)
    codes = descended(weight, start, moments, factor.order, threads=threads).codes + middle
    return Encoded(codes, refit_scales(weight, codes, scales, moments, threads=threads))


def refit_scales(
    weight: Tensor, codes: Tensor, scales: BlockScales, moments: Tensor, *, threads: int = 1
) -> BlockScales:
    """The float16 numbers of the best fit to fixed codes and integers, where they are better: weight (rows, columns)."""

    def refit(rows: Tensor) -> BlockScales:
        return _refit_rows(weight[rows], codes[rows], scales.of_rows(rows), moments)

    # Steps are too small for torch's own threads: waking them takes longer than one does.
    with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        return concatenated(list(pool.map(refit, torch.split(torch.arange(len(weight)), _ROWS_AT_ONCE))))


def _as_fit(codes: Tensor, scales: BlockScales) -> LayerFit:
    """The same in the solver's words: w = scale·(code − zero), codes on both sides of zero, zeros of any value."""
    grid, scale = scales.grid, scales.scale()
    middle = grid.levels // 2
    integers = Grid(bits=middle.bit_length(), symmetric=grid.lows == "centre")
    return LayerFit(integers, torch.float32, scale, scales.low() / scale - middle, codes - middle)


@torch.inference_mode()
def _refit_rows(weight: Tensor, codes: Tensor, scales: BlockScales, moments: Tensor) -> BlockScales:
    basis = _basis(codes, scales)
    present = torch.stack([scales.d, *([] if scales.minimum is None else [scales.minimum])], dim=2)
    found = _solved(weight, basis, present, moments)
    minimum = None if scales.minimum is None else found[..., 1]
    if scales.low_multiplier is not None and minimum is not None:
        minimum = minimum.clamp(min=0)
    tried = scales.with_floats(found[..., 0], minimum)
    better = row_errors(weight - tried.weights(codes), moments) < row_errors(
        weight - scales.weights(codes), moments
    )
    keep = better[:, None]
    return scales.with_floats(
        torch.where(keep, tried.d, scales.d),
        None
        if tried.minimum is None or scales.minimum is None
        else torch.where(keep, tried.minimum, scales.minimum),
    )


def _basis(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    """What each stored float multiplies: (rows, columns) for d and, if there is one, for the minimum."""
    grid = scales.grid

    def wide(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(grid.group, dim=1)

    of_codes = codes if scales.minimum is not None else codes - grid.levels // 2
    first = of_codes if scales.multiplier is None else of_codes * wide(scales.multiplier)
    if scales.minimum is None:
        return [first]
    if scales.low_multiplier is None:
        return [first, torch.ones_like(codes)]
    return [first, -wide(scales.low_multiplier)]


def _solved(weight: Tensor, basis: list[Tensor], present: Tensor, moments: Tensor) -> Tensor:
    """Solve for all floats of each row: present and result (rows, blocks, floats of a block)."""
    rows, blocks, kinds = present.shape
    size = weight.shape[1] // blocks
    pulled = weight @ moments
    right = torch.stack([(pulled * phi).view(rows, blocks, size).sum(2) for phi in basis], dim=2)
    gram = torch.empty(rows, blocks, kinds, blocks, kinds, dtype=weight.dtype, device=weight.device)
    for block in range(blocks):
        columns = slice(block * size, (block + 1) * size)
        for kind, phi in enumerate(basis):
            reached = phi[:, columns] @ moments[columns]
            for other, psi in enumerate(basis):
                gram[:, block, kind, :, other] = (reached * psi).view(rows, blocks, size).sum(2)
    matrix = gram.view(rows, blocks * kinds, -1)
    residual = right.view(rows, -1, 1) - matrix @ present.view(rows, -1, 1)
    # A ridge towards what is there: a block whose codes are all the middle one leaves its scale open.
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    matrix = matrix + torch.diag_embed(_RIDGE * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + 1e-30)
    step, failed = torch.linalg.solve_ex(matrix, residual)
    usable = (failed == 0)[:, None, None] & step.isfinite().all(1, keepdim=True)
    return present + torch.where(usable, step, 0).view_as(present)
