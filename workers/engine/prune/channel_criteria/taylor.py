"""A channel is worth the change of the loss when it goes, to first order (Molchanov et al. 2019, "Importance Estimation for
Neural Network Pruning", eq. 8), with the gate where the channel is read: Σ w · ∂L/∂w over the weights that read it."""

from __future__ import annotations

from torch import Tensor

from workers.engine.prune.channel_criteria.statistics import ChannelStatistics


def taylor(statistics: ChannelStatistics) -> Tensor | None:
    """Score by the mean square of the change, which compares between spaces too."""
    return statistics.loss_change
