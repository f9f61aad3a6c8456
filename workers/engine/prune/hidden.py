"""prune.hidden: narrow the states that pass from block to block, and refit the layers that read them or add to them.

Idea: one rotation for all blocks brings the states' strongest directions to the front, and the others are cut off: rows of the
layers that add to the states, columns of those that read them, of the embedding and the head. The gains of the norms move
into the layers that read first, since RMSNorm without gains knows no direction. Then, block by block, what is missing is
predicted from what there is.
Papers: Ashkboos et al. 2024, "SliceGPT", for the rotation; least squares in order as in Shopkhoev et al. 2025, "ReplaceMe".
Left out: another rotation for each block, which no plain configuration can hold; refitting experts, which are cut as they
are; training afterwards, which distill.logits does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import Architecture, architecture_in, is_compressible
from app.spec.attention_heads import GROUPS_KEY, HEADS_KEY, SIZE_KEY, head_counts
from app.spec.prune_hidden import PruneHidden, has_narrowable_states, width_multiple
from app.spec.report import LayerOutcome
from workers.engine.architectures.skeleton import model_without_weights
from workers.engine.calibration.block_journal import BlockJournal, open_journal
from workers.engine.calibration.block_stream import Calibration
from workers.engine.calibration.step_calibration import (
    calibration_in,
    calibration_windows,
    journal_key,
    split_progress,
)
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.checkpoint import Checkpoint, copy_side_files, write_config
from workers.engine.checkpoint.selection import select_layers
from workers.engine.prune.hidden_directions import (
    Directions,
    moment_of_states,
    strongest_directions,
    turned_to_gains,
)
from workers.engine.prune.hidden_fit import HiddenFit
from workers.engine.prune.hidden_outside import Outside, write_narrow
from workers.engine.technique import StepContext, StepOutcome, implements

# Of all but the writing, which takes little of the time; the original is run once to look, three times to fit.
_NARROWING, _LOOKING = 0.95, 0.2


@dataclass(frozen=True)
class _Sizes:
    """Of the hidden width, and of a head of attention, which configurations derive from it where they do not say it."""

    before: int
    after: int
    head: int


@implements(PruneHidden)
def prune_hidden(step: PruneHidden, context: StepContext) -> StepOutcome:
    """Write `context.target` with a smaller hidden width.

    Raises UnsupportedForModel where states cannot be turned or the model is quantized; InvalidRequest when nothing can be
    left out, the calibration text is too short, or a weight is not finite; JobFailed when the model's states are not.
    """
    checkpoint = Checkpoint.open(context.source)
    select_layers(checkpoint, ())
    sizes = _sizes(step, checkpoint)
    config = {architecture_in(checkpoint.config).hidden_key: sizes.after, SIZE_KEY: sizes.head}
    windows = calibration_windows(context, tokens=step.calibration_tokens, length=step.sequence_length)
    with open_journal(context.journal, context.target.parent, journal_key(step, context, windows)) as journal:
        _narrow(step, context, checkpoint, journal, windows, config)
        records = journal.records()
    copy_side_files(context.source, context.target)
    write_config(context.target, checkpoint.config | config)
    context.progress(1.0, "done")
    errors = tuple((float(index), float(record["lost"]) ** 0.5) for index, record in enumerate(records))
    return StepOutcome(
        layers=tuple(
            LayerOutcome(name=fact.name, action="pruned", parameters=fact.elements)
            for fact in checkpoint.facts()
            if is_compressible(fact.name, fact.shape)
        ),
        metrics={
            "hidden_size_before": sizes.before,
            "hidden_size_after": sizes.after,
            "calibration_tokens": windows.numel(),
            "relative_output_error": errors[-1][1],
        },
        curves={"relative_output_error": errors},
        flags=calibration_flags(context, windows, tokens=step.calibration_tokens),
    )


def _narrow(
    step: PruneHidden,
    context: StepContext,
    checkpoint: Checkpoint,
    journal: BlockJournal,
    windows: Tensor,
    config: dict[str, int],
) -> None:
    """Write the weights of the model that `config` makes of this one."""
    # In float32 whatever the weights are in: what is fitted are small differences of large states. On one device, since there
    # is one narrow model.
    calibration = replace(
        calibration_in(journal.directory, context, windows, share=_NARROWING), more_devices=()
    )
    looking, fitting = split_progress(calibration, _LOOKING)
    narrow = model_without_weights(context.source, **config)
    outside = Outside(checkpoint, is_tied=bool(narrow.config.tie_word_embeddings))
    directions = _directions(journal, looking, outside, narrow.config)
    sums = HiddenFit(fitting, journal, directions, narrow, repair=step.repair).run()
    write_narrow(
        checkpoint,
        {entry.name: entry for entry in journal.entries()},
        outside.narrowed(directions, sums if step.repair else None),
        context,
        progress=lambda share: context.progress(_NARROWING + (1 - _NARROWING) * share, "writing"),
    )


def _sizes(step: PruneHidden, checkpoint: Checkpoint) -> _Sizes:
    architecture = architecture_in(checkpoint.config)
    if not has_narrowable_states(architecture):
        raise _not_turned(architecture)
    heads = int(checkpoint.config[HEADS_KEY])
    groups = int(checkpoint.config.get(GROUPS_KEY) or heads)
    counts = head_counts(checkpoint.facts(), architecture, heads=heads, groups=groups)
    if counts is None:
        raise _not_turned(architecture)
    before = int(checkpoint.config[architecture.hidden_key])
    multiple = width_multiple(architecture, heads)
    after = step.width_after(before, multiple)
    if after is None:
        raise InvalidRequest(
            f"Of a hidden width of {before} nothing smaller is left that is a multiple of what is asked for and of {multiple}.",
            code="too_narrow",
            hint="Ask for another hidden_size, or a smaller round_to.",
        )
    return _Sizes(before, after, counts.size)


def _not_turned(architecture: Architecture) -> UnsupportedForModel:
    return UnsupportedForModel(
        f"The states of {architecture.name} cannot be turned, or its configuration cannot say what is left.",
        code="states_not_narrowed",
        hint="Use prune.width, prune.heads or prune.depth.",
    )


def _directions(journal: BlockJournal, calibration: Calibration, outside: Outside, config: Any) -> Directions:
    """As many as the narrow model, of this configuration, has; where an earlier try found them, its own."""
    kept = journal.kept("directions")
    if kept is None:
        moment = moment_of_states(
            calibration,
            last_block=config.num_hidden_layers - 1,
            epsilon=float(config.rms_norm_eps),
        )
        basis = strongest_directions(moment, config.hidden_size)
        if outside.is_tied:
            basis = turned_to_gains(basis, outside.gains())
        kept = {"basis": basis}
        journal.keep("directions", kept)
    return Directions(kept["basis"])
