"""What is common to steps that take channels out of every block, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from app.spec.architectures import architecture_in
from app.spec.prune import PruneHeads, PruneWidth
from app.spec.report import LayerOutcome
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
from workers.engine.checkpoint.layout import TensorEntry
from workers.engine.prune.block_narrower import BlockNarrower, Cut
from workers.engine.quantize.found_layers import write_journal
from workers.engine.quantize.silent_channels import SilentChannels
from workers.engine.technique import StepContext, StepOutcome

# Writing takes little of the time.
_SOLVING = 0.95


def narrowed(
    step: PruneWidth | PruneHeads,
    context: StepContext,
    checkpoint: Checkpoint,
    cut: Cut,
    *,
    config: dict[str, int],
) -> StepOutcome:
    """Write `context.target` without the channels that `cut` takes out, `config` in its config.json.

    Returns an outcome without layers. Raises InvalidRequest when the calibration text is too short, or a weight is not
    finite; JobFailed when the model's activations are not.
    """
    windows = calibration_windows(context, tokens=step.calibration_tokens, length=step.sequence_length)
    with open_journal(context.journal, context.target.parent, journal_key(step, context, windows)) as journal:
        stored = next(entry for entry in checkpoint.tensors.values() if cut.reads(entry.name))
        dtype = compute_dtype(stored.dtype, context.device)
        calibration = calibration_in(journal.directory, context, windows, share=_SOLVING, dtype=dtype)
        narrower = BlockNarrower(step, checkpoint, architecture_in(checkpoint.config), cut)
        solve_into(journal, calibration, narrower.narrow)
        records = journal.records()
        write_journal(checkpoint, {}, journal, context, solving=_SOLVING)
    copy_side_files(context.source, context.target)
    write_config(context.target, checkpoint.config | config)
    context.progress(1.0, "done")
    lost, had = (sum(record[f"outputs_{what}"] for record in records) for what in ("lost", "had"))
    silent = SilentChannels.joined(records)
    return StepOutcome(
        metrics={"calibration_tokens": windows.numel(), "relative_output_error": _share(lost, had)},
        curves={"relative_output_error": _errors(records)},
        warnings=tuple(warning for record in records for warning in record["warnings"]),
        flags=(
            *calibration_flags(context, windows, tokens=step.calibration_tokens),
            *silent.flags(dead_weights="Such channels went first."),
        ),
    )


def layer_outcomes(
    chosen: Iterable[TensorEntry], is_narrowed: Callable[[str], bool], *, reason: str
) -> tuple[LayerOutcome, ...]:
    """What became of every layer; `reason` is why others were left."""
    return tuple(
        LayerOutcome(name=entry.name, action="pruned", parameters=entry.fact.elements)
        if is_narrowed(entry.name)
        else LayerOutcome(name=entry.name, action="untouched", reason=reason, parameters=entry.fact.elements)
        for entry in chosen
    )


def _errors(records: list[dict[str, Any]]) -> tuple[tuple[float, float], ...]:
    return tuple(
        (float(index), _share(record["outputs_lost"], record["outputs_had"]))
        for index, record in enumerate(records)
    )


def _share(lost: float, had: float) -> float:
    return (lost / had) ** 0.5 if had else 0.0
