"""A channel is worth the size of its weights: L2 over all that write and read it (Li et al. 2017, "Pruning Filters for
Efficient ConvNets", with the group norm of Fang et al. 2023, "DepGraph", sec. 3.3)."""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.channel_criteria.statistics import ChannelStatistics


def magnitude(statistics: ChannelStatistics) -> Tensor:
    """Score by the norm of the weights."""
    return statistics.squares.sqrt()
