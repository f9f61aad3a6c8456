"""|w·∂L/∂w|: to first order, what the model's loss changes by when a weight goes.

Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 5 and 8, with magnitudes averaged in the
place of squares. L is that of the model before it was pruned.
"""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.criteria.statistics import LayerStatistics


def taylor(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Score by size and by the mean of |∂L/∂w| over windows: (rows, columns) -> (rows, columns). Needs the gradient."""
    if statistics.gradient is None:
        raise ValueError("needs the gradient of the loss")
    return weight.abs() * statistics.gradient
