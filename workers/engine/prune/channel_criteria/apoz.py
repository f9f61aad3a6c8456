"""A channel is worth how often it is not zero (Hu et al. 2016, "Network Trimming": average percentage of zeros)."""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.channel_criteria.statistics import ChannelStatistics


def apoz(statistics: ChannelStatistics) -> Tensor | None:
    """Score by one less the share of zeros."""
    return None if statistics.zero_share is None else 1 - statistics.zero_share
