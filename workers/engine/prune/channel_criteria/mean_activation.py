"""A channel is worth what it usually says (Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource
Efficient Inference", sec. 2.2, mean activation)."""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.channel_criteria.statistics import ChannelStatistics


def mean_activation(statistics: ChannelStatistics) -> Tensor | None:
    """Score by E|a|."""
    return statistics.mean_size
