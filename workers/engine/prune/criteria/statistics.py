"""What criteria may ask of a layer beside its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Generator, Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Of each input feature, in the order of the weight's columns, and of each weight."""

    moment: Tensor
    """(columns,), float32: E[x²], the diagonal of H = Σ x xᵀ / T."""
    factor: Tensor | None
    """(columns,), float32: U_jj of the Cholesky factor of H⁻¹ = Uᵀ U; U_jj² is the j-th diagonal element of the inverse
    of H without the columns before j. None where it was not asked for."""
    generator: Generator
    """For criteria that draw."""
    gradient: Tensor | None = None
    """(rows, columns), float32: the mean of |∂L/∂w| over windows. None where it was not asked for."""

    def of(self, columns: slice) -> LayerStatistics:
        """Those of some columns alone."""
        factor = None if self.factor is None else self.factor[columns]
        gradient = None if self.gradient is None else self.gradient[:, columns]
        return replace(self, moment=self.moment[columns], factor=factor, gradient=gradient)


Criterion = Callable[[Tensor, LayerStatistics], Tensor]
"""Weights (rows, columns), float32, and the statistics of these columns -> scores (rows, columns), float32."""
