"""Chance: the baseline that every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.prune.criteria.statistics import LayerStatistics


def random(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Score by lot: (rows, columns) -> (rows, columns)."""
    drawn = torch.rand(weight.shape, generator=statistics.generator)
    return drawn.to(weight.device)
