"""A channel is worth the scale its batch norm gives it (Liu et al. 2017, "Learning Efficient Convolutional Networks through
Network Slimming"); best where training has pushed the scales towards zero."""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.channel_criteria.statistics import ChannelStatistics


def norm_scale(statistics: ChannelStatistics) -> Tensor | None:
    """Score by |γ|; nothing where there is no batch norm."""
    return statistics.norm_scale
