"""Round the columns of a weight one after the other, and let those still free make up for what was lost.

With H = Σ x xᵀ / T of a layer's inputs, the error of its outputs is tr(ΔW H ΔWᵀ). Rounding column j with error e moves
the columns after it by −e·U_{j,j+1:} / U_jj, which is optimal for H⁻¹ = Uᵀ U (Frantar et al. 2022, GPTQ, sec. 3.2-3.3,
algorithm 1). Columns with the largest H_jj go first, while there are most left to compensate with.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.engine.checkpoint.streaming import one_torch_thread

BLOCK_COLUMNS = 128
_ATTEMPTS = 4
# With fewer, threads wait for each other longer than they save: two threads took 0.6 of the time of one at 4096 rows of
# 4096 columns, and twice the time at 960 rows of 576.
_ROWS_PER_THREAD = 2048


class NotPositiveDefinite(Exception):  # noqa: N818 - the caller decides whether that is an error
    """The statistics have no Cholesky factor, however strongly damped."""


@dataclass(frozen=True)
class ColumnGrid:
    """The grid of each row and group: scale and zero point (rows, groups), float32; `group_of` (columns,), int64."""

    scale: Tensor
    zero: Tensor
    group_of: Tensor
    half: int
    """Codes go from −half to half − 1."""

    def of_rows(self, rows: Tensor) -> ColumnGrid:
        """The grids of some rows."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])


@dataclass(frozen=True)
class Factor:
    """In which order to round the columns, and how those still free follow."""

    order: Tensor
    """(n,), int64: columns by descending moment of their inputs."""
    upper: Tensor
    """(n, n), upper triangular, in that order: (H + damping)⁻¹ = Uᵀ U."""
    damping: float
    """As a share of the mean of diag H."""


def factorize(second_moment: Tensor, damping: float) -> Factor:
    """Order the columns and factor H⁻¹: (n, n), float32. Inputs that were always zero get a moment of one.

    A factorization that fails is tried again with ten times the damping, three times. Raises NotPositiveDefinite then.
    """
    moments = second_moment.diagonal()
    order = torch.argsort(moments, descending=True, stable=True)
    ordered = second_moment[order][:, order]
    ordered.diagonal()[moments[order] == 0] = 1.0
    for attempt in range(_ATTEMPTS):
        strength = damping * 10**attempt
        upper = inverse_factor(ordered, strength * ordered.diagonal().mean())
        if upper is not None:
            return Factor(order, upper, strength)
    raise NotPositiveDefinite


def inverse_factor(second_moment: Tensor, added: Tensor | float) -> Tensor | None:
    """U with (H + added·I)⁻¹ = Uᵀ U, upper triangular: (n, n) -> (n, n); None if there is none in float32.

    U = J·L⁻¹·J with L the Cholesky factor of J·H·J and J the flip: no inverse is formed.
    """
    flipped = second_moment.flip(0, 1)
    flipped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    if failed:
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper if torch.isfinite(upper).all() else None


def compensated_codes(weight: Tensor, factor: Factor, grid: ColumnGrid, *, threads: int = 1) -> Tensor:
    """Codes of a weight by GPTQ: (rows, columns), float32 -> (rows, columns), float32.

    Rows do not depend on each other: each of `threads` threads takes some, if there are enough to be worth it.
    """
    parts = min(threads, len(weight) // _ROWS_PER_THREAD) if weight.device.type == "cpu" else 1
    rows = torch.arange(len(weight)).chunk(max(1, parts))
    # Steps are too small for torch's own threads: waking them takes longer than one does.
    with one_torch_thread(), ThreadPoolExecutor(len(rows)) as pool:
        done = pool.map(lambda part: _codes_of_rows(weight[part], factor, grid.of_rows(part)), rows)
        return torch.cat(list(done))


@torch.inference_mode()
def _codes_of_rows(weight: Tensor, factor: Factor, grid: ColumnGrid) -> Tensor:
    # Columns lie together in memory: each is read and written as a whole.
    columns = weight.t()[factor.order].contiguous()
    codes = _round_in_order(columns, factor.upper, grid, grid.group_of[factor.order])
    restored = torch.empty_like(codes)
    restored[factor.order] = codes
    return restored.t().contiguous()


def _round_in_order(columns: Tensor, upper: Tensor, grid: ColumnGrid, group_of: Tensor) -> Tensor:
    """Round row after row of the transposed weight: columns (columns, rows), overwritten -> codes (columns, rows)."""
    codes = torch.empty_like(columns)
    scales, zeros = grid.scale.t().contiguous(), grid.zero.t().contiguous()
    groups = group_of.tolist()
    for start in range(0, len(columns), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(columns))
        block = upper[start:stop, start:stop]
        errors = torch.empty_like(columns[start:stop])
        for j in range(stop - start):
            column, group = columns[start + j], groups[start + j]
            scale, zero = scales[group], zeros[group]
            code = torch.addcdiv(zero, column, scale).round_().clamp_(-grid.half, grid.half - 1)
            codes[start + j] = code
            error = column.sub(code.sub_(zero).mul_(scale)).div_(block[j, j])
            errors[j] = error
            columns[start + j + 1 : stop].addr_(block[j, j + 1 :], error, alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return codes


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """tr(D H Dᵀ), the expected squared error of a layer's outputs: (rows, columns), (columns, columns) -> a number."""
    return float(torch.sum((difference @ second_moment) * difference, dtype=torch.float64))
