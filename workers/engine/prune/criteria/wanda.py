"""|w_ij|·‖x_j‖: a weight is worth what it usually adds to its output (Sun et al. 2023, "A Simple and Effective Pruning
Approach for Large Language Models", eq. 1)."""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.criteria.statistics import LayerStatistics


def wanda(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Score by size and by the root mean square of the input: (rows, columns) -> (rows, columns)."""
    return weight.abs() * statistics.moment.sqrt()
