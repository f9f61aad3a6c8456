"""How many channels each space keeps: one ranking over the whole network, cut where the target is met.

Spaces so keep different shares. Each keeps at least a floor, and a multiple that kernels like. Scores of most criteria mean
something within a space alone, and are divided by its mean first (Molchanov et al. 2017, sec. 2.3); then by the cost of a
channel, where the target is a cost: what is worth least for what it costs goes first.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import InvalidRequest
from workers.engine.prune.channel_layout import Channels


@dataclass(frozen=True)
class Target:
    """What is to be left."""

    of: str
    """`macs` or `channels`."""
    share: float
    """Of the multiplications, or of the channels that may go."""
    floor: float
    """Share of each space's channels that stays whatever they score."""
    round_to: int

    def least(self, size: int) -> int:
        """The fewest channels that a space of `size` can be left with."""
        return self.rounded(math.ceil(self.floor * size), size)

    def rounded(self, count: int, size: int) -> int:
        """The next multiple, or all there are."""
        return min(size, max(1, math.ceil(count / self.round_to)) * self.round_to)

    def amount(self, channels: Channels, kept: Mapping[int, int] | None = None) -> int:
        """Multiplications, or channels of the spaces that may lose some."""
        if self.of == "macs":
            return channels.macs(kept)
        return sum((kept or {}).get(space, channels.sizes[space]) for space in channels.free)


def choose(
    channels: Channels, scores: Mapping[int, Tensor], target: Target, *, by_space: bool
) -> dict[int, Tensor]:
    """Which channels stay, of each space that loses some: indices, ascending; the earlier wins a tie.

    `scores` by space; `by_space`: they mean something within a space alone. A space without scores keeps all.
    Raises InvalidRequest (`target_out_of_reach`).
    """
    ranked = comparable(channels, scores, target, by_space=by_space)
    counts = chosen_counts(channels, ranked, target)
    return {
        space: torch.argsort(scores[space], descending=True, stable=True)[:count].sort().values
        for space, count in counts.items()
        if count < channels.sizes[space]
    }


def chosen_counts(channels: Channels, scores: Mapping[int, Tensor], target: Target) -> dict[int, int]:
    """How many channels each space keeps so that the target is just met.

    `scores` by space, comparable between spaces; a space without keeps all. Raises InvalidRequest (`target_out_of_reach`).
    """
    order = sorted((float(score), space) for space, found in scores.items() for score in found)
    wanted = target.share * target.amount(channels)

    def counts(gone: int) -> dict[int, int]:
        left = {space: channels.sizes[space] for space in scores}
        for _, space in order[:gone]:
            left[space] -= 1
        return {
            space: max(target.rounded(count, channels.sizes[space]), target.least(channels.sizes[space]))
            for space, count in left.items()
        }

    def is_met(gone: int) -> bool:
        return target.amount(channels, counts(gone)) <= wanted

    gone = bisect.bisect_left(range(len(order) + 1), x=True, key=is_met)
    if gone > len(order):
        least = target.amount(channels, counts(len(order))) / target.amount(channels)
        raise InvalidRequest(
            f"{target.of} {target.share:g} is out of reach: with a floor of {target.floor:g} and multiples of "
            f"{target.round_to}, {least:.3f} are left.",
            code="target_out_of_reach",
            hint="Ask for less, or lower floor or round_to.",
        )
    return counts(gone)


def comparable(
    channels: Channels, scores: Mapping[int, Tensor], target: Target, *, by_space: bool
) -> dict[int, Tensor]:
    """Scores that compare between spaces: `by_space`, as shares of their mean there; for what a channel costs, if that counts."""
    found = {}
    for space, values in scores.items():
        shares = values / values.mean().clamp_min(torch.finfo(values.dtype).tiny) if by_space else values
        found[space] = shares / _cost(channels, space) if target.of == "macs" else shares
    return found


def _cost(channels: Channels, space: int) -> float:
    """Share of the network's multiplications that goes with one channel of a space."""
    one_less = {space: channels.sizes[space] - 1}
    return 1 - channels.macs(one_less) / channels.macs()
