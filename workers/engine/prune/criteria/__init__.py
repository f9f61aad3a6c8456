"""Importance of single weights: what each criterion says a weight is worth, for every pruner that asks.

A criterion is a function (weight, statistics) -> scores of the weight's shape; the lowest go first. One file each.
"""

from workers.engine.prune.criteria.gradient import gradient
from workers.engine.prune.criteria.magnitude import magnitude
from workers.engine.prune.criteria.optimal_brain import optimal_brain
from workers.engine.prune.criteria.random import random
from workers.engine.prune.criteria.statistics import Criterion, LayerStatistics
from workers.engine.prune.criteria.taylor import taylor
from workers.engine.prune.criteria.wanda import wanda

CRITERIA: dict[str, Criterion] = {
    "sparsegpt": optimal_brain,
    "wanda": wanda,
    "taylor": taylor,
    "gradient": gradient,
    "magnitude": magnitude,
    "random": random,
}
"""By the names that specs give them."""

__all__ = ["CRITERIA", "Criterion", "LayerStatistics"]
