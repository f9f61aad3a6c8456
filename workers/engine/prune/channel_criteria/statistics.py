"""What criteria may ask of the channels of one space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor


@dataclass(frozen=True)
class ChannelStatistics:
    """One number for each channel: (channels,), float32; None where the network has nothing of the kind for this space."""

    squares: Tensor
    """Sum of squares of the weights that write and that read the channel."""
    norm_scale: Tensor | None
    """Mean size of the scales of its batch norms."""
    mean_size: Tensor | None
    """E|a| of its activations."""
    zero_share: Tensor | None
    """Share of its activations that are zero."""
    loss_change: Tensor | None
    """E[(Σ w · ∂L/∂w)²] over the weights that read it."""
    generator: Generator
    """For criteria that draw."""


Criterion = Callable[[ChannelStatistics], Tensor | None]
"""Scores (channels,), the lowest go first; None where it has nothing to say, and the channels stay."""
