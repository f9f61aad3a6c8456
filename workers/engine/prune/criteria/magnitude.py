"""|w|: a weight is worth its size (Han et al. 2015, "Learning both Weights and Connections", sec. 3)."""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.criteria.statistics import LayerStatistics


def magnitude(weight: Tensor, _statistics: LayerStatistics) -> Tensor:
    """Score by size, whatever the inputs: (rows, columns) -> (rows, columns)."""
    return weight.abs()
