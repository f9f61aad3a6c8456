"""w²/U_jj²: what the layer's outputs lose when a weight goes and those after it make up for it.

Hassibi and Stork 1993, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", eq. 5, on one column after
the other as in Frantar and Alistarh 2023, "SparseGPT", sec. 3.2-3.3.
"""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.criteria.statistics import LayerStatistics


def optimal_brain(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Score by the error that remains: (rows, columns) -> (rows, columns). Needs the factor.

    A weight whose input never was anything but zero is worth nothing.
    """
    if statistics.factor is None:
        raise ValueError("needs the factor of the inputs' second moments")
    return (weight / statistics.factor).square_() * (statistics.moment > 0)
