"""Chance: the baseline that every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.prune.channel_criteria.statistics import ChannelStatistics


def random(statistics: ChannelStatistics) -> Tensor:
    """Score by lot."""
    return torch.rand(statistics.squares.shape, generator=statistics.generator)
