"""prune.width: remove channels inside the feed-forward parts, and refit the layers that read them.

Idea: a channel goes with its rows in the layers that write it and its column in the one that reads it, and a smaller
dense model is left. The second moments of the channels on calibration text say what the outputs lose, and what of it the
channels that stay can make up for. Every block loses as many, since config.json has one number for all. Blocks are done
in order, each calibrated on what the narrower ones before it give.
Papers: Hassibi and Stork 1993, "Optimal Brain Surgeon"; Kurtic et al. 2023, "ZipLM"; the mean of what goes is folded into
a bias where there is one, as in An et al. 2024, "Fluctuation-based Adaptive Structured Pruning" (FLAP).
Left out: another width for each block, attention heads and the hidden width; training afterwards, which distill.logits does.
"""

from __future__ import annotations

from typing import Any

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import Architecture, architecture_in
from app.spec.feed_forward import FeedForward, channel_axis, feed_forward_of, widths_of
from app.spec.prune import PruneWidth
from app.spec.report import Flag, LayerOutcome
from workers.engine.calibration.block_journal import open_journal
from workers.engine.calibration.block_stream import compute_dtype
from workers.engine.calibration.step_calibration import (
    calibration_in,
    calibration_windows,
    journal_key,
    solve_into,
)
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.checkpoint import Checkpoint, copy_side_files, write_config
from workers.engine.checkpoint.selection import Selection, select_layers
from workers.engine.prune.block_narrower import BlockNarrower
from workers.engine.quantize.found_layers import write_found
from workers.engine.quantize.silent_channels import SilentChannels
from workers.engine.technique import StepContext, StepOutcome, implements

# Writing takes little of the time.
_SOLVING = 0.95


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
    windows = calibration_windows(context, tokens=step.calibration_tokens, length=step.sequence_length)
    with open_journal(context.journal, context.target.parent, journal_key(step, context, windows)) as journal:
        stored = next(entry for entry in selection.chosen.values() if channel_axis(entry.name, architecture))
        calibration = calibration_in(
            journal.directory,
            context,
            windows,
            share=_SOLVING,
            dtype=compute_dtype(stored.dtype, context.device),
        )
        narrower = BlockNarrower(step, checkpoint, architecture, after)
        solve_into(journal, calibration, narrower.narrow)
        records = journal.records()
        write_found(
            checkpoint,
            {},
            {entry.name: entry for entry in journal.entries()},
            context,
            progress=lambda share: context.progress(_SOLVING + (1 - _SOLVING) * share, "writing"),
        )
    copy_side_files(context.source, context.target)
    write_config(context.target, checkpoint.config | {layout.width_key: after})
    context.progress(1.0, "done")
    return _outcome(
        selection,
        architecture,
        records,
        metrics={"width_before": before, "width_after": after, "calibration_tokens": windows.numel()},
        flags=calibration_flags(context, windows, tokens=step.calibration_tokens),
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


def _outcome(
    selection: Selection,
    architecture: Architecture,
    records: list[dict[str, Any]],
    *,
    metrics: dict[str, float | int | str | None],
    flags: tuple[Flag, ...],
) -> StepOutcome:
    layers = tuple(
        LayerOutcome(name=name, action="pruned", parameters=entry.fact.elements)
        if channel_axis(name, architecture)
        else LayerOutcome(
            name=name,
            action="untouched",
            reason="no layer of the feed-forward part",
            parameters=entry.fact.elements,
        )
        for name, entry in selection.chosen.items()
    )
    lost = sum(record["outputs_lost"] for record in records)
    had = sum(record["outputs_had"] for record in records)
    return StepOutcome(
        layers=layers,
        metrics=metrics | {"relative_output_error": _share(lost, had)},
        curves={
            "relative_output_error": tuple(
                (float(index), _share(record["outputs_lost"], record["outputs_had"]))
                for index, record in enumerate(records)
            )
        },
        warnings=tuple(warning for record in records for warning in record["warnings"]),
        flags=(*flags, *SilentChannels.joined(records).flags(dead_weights="Such channels went first.")),
    )


def _share(lost: float, had: float) -> float:
    return (lost / had) ** 0.5 if had else 0.0
