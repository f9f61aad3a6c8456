"""Weights that are zero because they were pruned, and must stay so while what is around them is rounded and moved."""

from __future__ import annotations

from torch import Tensor

# Of a layer's weights. By chance a trained weight is hardly ever zero; weights in few bits, unpacked, are more often.
_LEAST_SHARE = 0.2


def is_pruned(weight: Tensor) -> bool:
    """Whether so many of a whole layer's weights are zero that it must have been pruned."""
    return 1 - int(weight.count_nonzero()) / weight.numel() >= _LEAST_SHARE


def held_zeros(weight: Tensor) -> Tensor | None:
    """Where a pruned layer's weight is zero: (rows, columns), bool; None for a layer that was not pruned."""
    return weight == 0 if is_pruned(weight) else None
