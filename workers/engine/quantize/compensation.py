"""Round the columns of a weight one after the other, and let those still free make up for what was lost.

With H = Σ x xᵀ / T of a layer's inputs, the error of its outputs is tr(ΔW H ΔWᵀ). Rounding column j with error e moves
the columns after it by −e·U_{j,j+1:} / U_jj, which is optimal for H⁻¹ = Uᵀ U (Frantar et al. 2022, GPTQ, sec. 3.2-3.3,
algorithm 1). Columns with the largest H_jj go first, while there are most left to compensate with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.engine.quantize.column_sweep import round_in_order
from workers.engine.quantize.layer_fit import LayerFit
from workers.engine.quantize.triangular import factor_lower_, invert_lower_, mirror_upper_, rearrange_

_ATTEMPTS = 4
_COLUMNS_AT_ONCE = 2048


class NotPositiveDefinite(Exception):  # noqa: N818 - the caller decides whether that is an error
    """The statistics have no Cholesky factor, however strongly damped."""


@dataclass(frozen=True)
class Factor:
    """In which order to round the columns, and how those still free follow.

    In that order (H + damping)⁻¹ = Uᵀ U with U upper triangular. U = J·L⁻¹·J, L the Cholesky factor of J·H·J and J the
    flip: no inverse of H is formed, and U stays flipped as it comes, in the memory of H.
    """

    order: Tensor
    """(n,), int64: columns by descending moment of their inputs."""
    flipped: Tensor
    """(n, n): J·U·J, lower triangular; what is above the diagonal is something else."""
    damping: float
    """As a share of the mean of diag H."""

    def diagonal(self) -> Tensor:
        """U_jj in the order of the columns: (n,)."""
        return self.flipped.diagonal().flip(0)

    def coupling(self, rows: slice, columns: slice) -> Tensor:
        """(U_{c,r} / U_{c,c})ᵀ: how far column r moves for one of column c's error; rows after columns, or the same."""
        n = len(self.order)
        part = self.flipped[n - columns.stop : n - columns.start, n - rows.stop : n - rows.start].flip(0, 1)
        return part.div_(self.diagonal()[columns].unsqueeze(1)).t()


def factorize(second_moment: Tensor, damping: float) -> Factor:
    """Order the columns and factor H⁻¹: (n, n), float32. Inputs that were always zero get a moment of one.

    A factorization that fails is tried again with ten times the damping, three times.
    Raises NotPositiveDefinite then.
    """
    return _factorize_(second_moment.clone(), damping, _rounding_order(second_moment.diagonal()))


def factor_or_none(second_moment: Tensor, damping: float, names: str, warnings: list[str]) -> Factor | None:
    """What all layers of an input share; None where there is no factor. `warnings` then name them, and where H was damped more."""
    return _or_none(lambda: factorize(second_moment, damping), damping, names, warnings)


@contextmanager
def factored_in_place(
    second_moment: Tensor,
    damping: float,
    names: str,
    warnings: list[str],
    order: Tensor | None = None,
) -> Iterator[Factor | None]:
    """The same in the memory of H, which is H again afterwards. Needs a few rows' memory beside it.

    `order` (n,), int64: in which columns are gone through, if not by descending moment.
    """
    moments = second_moment.diagonal().clone()
    order = _rounding_order(moments) if order is None else order
    try:
        yield _or_none(lambda: _factorize_(second_moment, damping, order), damping, names, warnings)
    finally:
        # What is above the diagonal is H's still.
        flipped = order.flip(0)
        second_moment.diagonal().copy_(moments[flipped])
        mirror_upper_(second_moment)
        rearrange_(second_moment, torch.argsort(flipped))


def _factorize_(matrix: Tensor, damping: float, order: Tensor) -> Factor:
    moments = matrix.diagonal().clone()
    moments = torch.where(moments == 0, torch.ones_like(moments), moments)
    rearrange_(matrix, order.flip(0))
    for attempt in range(_ATTEMPTS):
        strength = damping * 10**attempt
        if attempt:
            mirror_upper_(matrix)
        matrix.diagonal().copy_(moments[order.flip(0)] + strength * moments.mean())
        if factor_lower_(matrix):
            invert_lower_(matrix)
            if torch.isfinite(matrix.diagonal()).all() and torch.isfinite(matrix.sum()):
                return Factor(order, matrix, strength)
    raise NotPositiveDefinite


def _rounding_order(moments: Tensor) -> Tensor:
    return torch.argsort(moments, descending=True, stable=True)


def _or_none(find: Callable[[], Factor], damping: float, names: str, warnings: list[str]) -> Factor | None:
    try:
        factor = find()
    except NotPositiveDefinite:
        warnings.append(f"not compensated, since the inputs' statistics have no factor: {names}")
        return None
    if factor.damping > damping:
        warnings.append(f"damped by {factor.damping:g} to have a factor: {names}")
    return factor


@contextmanager
def damped(second_moment: Tensor, damping: float) -> Iterator[None]:
    """H as it was factored, in place and for as long as it is refined with: see `factorize`."""
    diagonal = second_moment.diagonal()
    before = diagonal.clone()
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damping * diagonal.mean())
    yield
    diagonal.copy_(before)


def compensated(weight: Tensor, factor: Factor, fit: LayerFit, *, threads: int = 1) -> LayerFit:
    """The same scales and zero points with the codes that GPTQ finds: weight (rows, columns), float32."""
    return replace(fit, codes=round_in_order(weight, factor.coupling, factor.order, fit, threads=threads))


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """tr(D H Dᵀ), the expected squared error of a layer's outputs: (rows, columns), (columns, columns) -> a number."""
    return float(row_errors(difference, second_moment).sum(dtype=torch.float64))


def row_errors(difference: Tensor, second_moment: Tensor) -> Tensor:
    """diag(D H Dᵀ): the expected squared error of each output: (rows, columns) -> (rows,), float32.

    Multiplied in the dtype of D: H is brought to it a few columns at a time.
    """
    errors = torch.zeros(len(difference), device=difference.device)
    for start in range(0, len(second_moment), _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        products = difference @ second_moment[:, columns].to(difference.dtype)
        errors += products.mul_(difference[:, columns]).sum(1, dtype=torch.float32)
    return errors
