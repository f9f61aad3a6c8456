"""|∂L/∂w|: a weight is worth what the model's loss feels of it, whatever its size.

The magnitude of gradients alone, as Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language
Models", compare with in table 6. L is that of the model before it was pruned; see workers/engine/calibration/model_tail.py.
"""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.criteria.statistics import LayerStatistics


def gradient(_weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Score by the mean of |∂L/∂w| over windows: (rows, columns) -> (rows, columns). Needs the gradient."""
    if statistics.gradient is None:
        raise ValueError("needs the gradient of the loss")
    return statistics.gradient
