"""Importance of channels: what each criterion says a channel is worth, one file each; the lowest go first."""

from workers.engine.prune.channel_criteria.apoz import apoz
from workers.engine.prune.channel_criteria.magnitude import magnitude
from workers.engine.prune.channel_criteria.mean_activation import mean_activation
from workers.engine.prune.channel_criteria.norm_scale import norm_scale
from workers.engine.prune.channel_criteria.random import random
from workers.engine.prune.channel_criteria.statistics import ChannelStatistics, Criterion
from workers.engine.prune.channel_criteria.taylor import taylor

CRITERIA: dict[str, Criterion] = {
    "taylor": taylor,
    "magnitude": magnitude,
    "norm_scale": norm_scale,
    "mean_activation": mean_activation,
    "apoz": apoz,
    "random": random,
}
"""By the names that specs give them."""

__all__ = ["CRITERIA", "ChannelStatistics", "Criterion"]
