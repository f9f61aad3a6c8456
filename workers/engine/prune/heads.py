"""prune.heads: remove heads of attention, and refit the layer that reads them.

Idea: query heads that share a key and a value head go together with these: rows of the projections that write them and
columns of the one that reads them. A smaller dense model is left, whose configuration says how many heads there are and
how large each is. The second moments of the heads' outputs on calibration text say what is lost, and what of it those
that stay can make up for. Every block loses as many, since config.json has one number for all; which, each block says.
Papers: Michel et al. 2019, "Are Sixteen Heads Really Better than One?"; Kurtic et al. 2023, "ZipLM"; the mean of what goes
is folded into a bias where there is one, as in An et al. 2024, FLAP.
Left out: another number for each block, and merging heads; training afterwards, which distill.logits does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import Architecture, architecture_in
from app.spec.attention_heads import (
    GROUPS_KEY,
    HEADS_KEY,
    SIZE_KEY,
    HeadCounts,
    has_removable_heads,
    head_axis,
    head_counts,
    possible_groups,
    reads_heads,
)
from app.spec.prune import PruneHeads
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.selection import select_layers
from workers.engine.prune.head_selection import (
    groups_hardest_to_replace,
    inputs_of_groups,
    strongest_groups,
)
from workers.engine.prune.narrowing import layer_outcomes, narrowed
from workers.engine.technique import StepContext, StepOutcome, implements


@dataclass(frozen=True)
class HeadCut:
    """Leaves `after` groups of heads in every attention."""

    architecture: Architecture
    counts: HeadCounts
    after: int

    def reads(self, name: str) -> bool:
        """See `Cut`."""
        return reads_heads(name, self.architecture)

    def hardest_to_replace(self, weight: Tensor, inverse: Tensor) -> Tensor:
        """See `Cut`."""
        return inputs_of_groups(
            groups_hardest_to_replace(weight, inverse, self._inputs, self.after), self._inputs
        )

    def strongest(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """See `Cut`."""
        return inputs_of_groups(
            strongest_groups(weight, second_moment, self._inputs, self.after), self._inputs
        )

    def rows(self, name: str, kept: Tensor) -> tuple[int, Tensor] | None:
        """See `Cut`."""
        axis = head_axis(name, self.architecture)
        if axis is None:
            return None
        groups = kept[:: self._inputs] // self._inputs
        parts, start = [], 0
        for of_queries in axis.of_queries:
            channels = self.counts.channels(of_queries=of_queries)
            parts.append(start + inputs_of_groups(groups, channels))
            start += self.counts.groups * channels
        return axis.dimension, torch.cat(parts)

    @property
    def _inputs(self) -> int:
        """Inputs of the reader that belong to one group."""
        return self.counts.channels(of_queries=True)


@implements(PruneHeads)
def prune_heads(step: PruneHeads, context: StepContext) -> StepOutcome:
    """Write `context.target` with fewer heads, everything else as it was.

    Raises UnsupportedForModel when the configuration cannot say how many are left; InvalidRequest when the calibration
    text is too short, or a weight is not finite; JobFailed when the model's activations are not.
    """
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, ())
    architecture = architecture_in(checkpoint.config)
    counts = _counts(checkpoint, architecture)
    cut = HeadCut(architecture, counts, _groups_after(step, architecture, counts, checkpoint))
    left = replace(counts, groups=cut.after)
    config = {HEADS_KEY: left.queries, GROUPS_KEY: left.groups, SIZE_KEY: counts.size}
    outcome = narrowed(step, context, checkpoint, cut, config=config)
    return replace(
        outcome,
        layers=(
            *layer_outcomes(
                selection.chosen.values(),
                lambda name: head_axis(name, architecture) is not None,
                reason="no layer of the attention's heads",
            ),
            *selection.untouched,
        ),
        metrics={
            "heads_before": counts.queries,
            "heads_after": left.queries,
            "key_value_heads_before": counts.groups,
            "key_value_heads_after": left.groups,
        }
        | outcome.metrics,
    )


def _counts(checkpoint: Checkpoint, architecture: Architecture) -> HeadCounts:
    counts = None
    if has_removable_heads(architecture):
        heads = int(checkpoint.config[HEADS_KEY])
        groups = int(checkpoint.config.get(GROUPS_KEY) or heads)
        counts = head_counts(checkpoint.facts(), architecture, heads=heads, groups=groups)
    if counts is None:
        raise UnsupportedForModel(
            f"The configuration of {architecture.name} cannot say that heads are missing.",
            code="heads_not_in_config",
            hint="Use prune.width or prune.depth.",
        )
    return counts


def _groups_after(
    step: PruneHeads, architecture: Architecture, counts: HeadCounts, checkpoint: Checkpoint
) -> int:
    hidden = int(checkpoint.config[architecture.hidden_key])
    after = step.groups_after(counts.groups, possible_groups(architecture, counts, counts.groups, hidden))
    if after is None:
        raise InvalidRequest(
            f"No number of heads smaller than the {counts.queries} there are, in groups of {counts.per_group}, can be written.",
            code="too_few_heads",
            hint="Use prune.width or prune.depth.",
        )
    return after
