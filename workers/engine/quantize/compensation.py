"""Round the columns of a weight one after the other, and let those still free make up for what was lost.

With H = Σ x xᵀ / T of a layer's inputs, the error of its outputs is tr(ΔW H ΔWᵀ). Rounding column j with error e moves
the columns after it by −e·U_{j,j+1:} / U_jj, which is optimal for H⁻¹ = Uᵀ U (Frantar et al. 2022, GPTQ, sec. 3.2-3.3,
algorithm 1). Columns with the largest H_jj go first, while there are most left to compensate with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.engine.quantize.column_sweep import round_in_order
from workers.engine.quantize.layer_fit import LayerFit

_ATTEMPTS = 4


class NotPositiveDefinite(Exception):  # noqa: N818 - the caller decides whether that is an error
    """The statistics have no Cholesky factor, however strongly damped."""


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
    del flipped
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper if torch.isfinite(upper).all() else None


def compensated(weight: Tensor, factor: Factor, fit: LayerFit, *, threads: int = 1) -> LayerFit:
    """The same scales and zero points with the codes that GPTQ finds: weight (rows, columns), float32."""
    coupling = (factor.upper / factor.upper.diagonal().unsqueeze(1)).t()
    codes = round_in_order(weight, coupling, factor.order, fit, threads=threads)
    return replace(fit, codes=codes)


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """tr(D H Dᵀ), the expected squared error of a layer's outputs: (rows, columns), (columns, columns) -> a number."""
    return float(row_errors(difference, second_moment).sum(dtype=torch.float64))


def row_errors(difference: Tensor, second_moment: Tensor) -> Tensor:
    """diag(D H Dᵀ): the expected squared error of each output: (rows, columns) -> (rows,)."""
    return (difference @ second_moment).mul_(difference).sum(1)
