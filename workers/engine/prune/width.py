"""prune.width: remove channels inside the feed-forward parts, and refit the layers that read them.

Idea: a channel goes with its rows in the layers that write it and its column in the one that reads it, and a smaller
dense model is left. The second moments of the channels on calibration text say what the outputs lose, and what of it the
channels that stay can make up for. Every block loses as many, since config.json has one number for all. Blocks are done
in order, each calibrated on what the narrower ones before it give.
Papers: Hassibi and Stork 1993, "Optimal Brain Surgeon"; Kurtic et al. 2023, "ZipLM"; the mean of what goes is folded into
a bias where there is one, as in An et al. 2024, "Fluctuation-based Adaptive Structured Pruning" (FLAP).
Left out: another width for each block; training afterwards, which distill.logits does. Heads of attention: prune.heads. The hidden
width: prune.hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import Architecture, architecture_in
from app.spec.feed_forward import FeedForward, channel_axis, feed_forward_of, is_reader, widths_of
from app.spec.prune import PruneWidth
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.selection import select_layers
from workers.engine.prune.channel_selection import hardest_to_replace, strongest
from workers.engine.prune.narrowing import layer_outcomes, narrowed
from workers.engine.technique import StepContext, StepOutcome, implements


@dataclass(frozen=True)
class ChannelCut:
    """Leaves `after` of the `before` channels of every feed-forward part."""

    architecture: Architecture
    before: int
    after: int

    def reads(self, name: str) -> bool:
        """See `Cut`."""
        return is_reader(name, self.architecture)

    def hardest_to_replace(self, weight: Tensor, inverse: Tensor) -> Tensor:
        """See `Cut`."""
        return hardest_to_replace(weight, inverse, self.after)

    def strongest(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """See `Cut`."""
        return strongest(weight, second_moment, self.after)

    def rows(self, name: str, kept: Tensor) -> tuple[int, Tensor] | None:
        """See `Cut`."""
        axis = channel_axis(name, self.architecture)
        if axis is None:
            return None
        return axis.dimension, torch.cat([kept + copy * self.before for copy in range(axis.copies)])


@implements(PruneWidth)
def prune_width(step: PruneWidth, context: StepContext) -> StepOutcome:
    """Write `context.target` with narrower feed-forward parts, everything else as it was.

    Raises UnsupportedForModel for a mixture of experts; InvalidRequest when no channel could go, the calibration text is
    too short, or a weight is not finite; JobFailed when the model's activations are not.
    """
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, ())
    architecture = architecture_in(checkpoint.config)
    layout = _layout(architecture)
    before, after = _widths(step, checkpoint, architecture)
    cut = ChannelCut(architecture, before, after)
    outcome = narrowed(step, context, checkpoint, cut, config={layout.width_key: after})
    return replace(
        outcome,
        layers=layer_outcomes(
            selection.chosen.values(),
            lambda name: channel_axis(name, architecture) is not None,
            reason="no layer of the feed-forward part",
        ),
        metrics={"width_before": before, "width_after": after} | outcome.metrics,
    )


def _layout(architecture: Architecture) -> FeedForward:
    layout = feed_forward_of(architecture)
    if layout is None:
        raise UnsupportedForModel(
            f"{architecture.name} has experts, each with channels of its own that only some tokens reach.",
            code="mixture_of_experts",
            hint="Use prune.depth to make it smaller, or prune.calibrated.",
        )
    return layout


def _widths(step: PruneWidth, checkpoint: Checkpoint, architecture: Architecture) -> tuple[int, int]:
    """How many channels every block has, and how many it will have."""
    (before,) = widths_of(checkpoint.facts(), architecture)
    after = step.width_after(before)
    if after is None:
        raise InvalidRequest(
            f"No multiple of {step.round_to} is smaller than the {before} channels there are.",
            code="too_narrow",
            hint="Ask for a smaller round_to.",
        )
    return before, after
