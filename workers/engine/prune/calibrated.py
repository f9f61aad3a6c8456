"""prune.calibrated: set weights to zero by what it does to each layer's outputs, on inputs from calibration text.

Idea: with the second moments H of a layer's inputs, the error of its outputs is tr(ΔW H ΔWᵀ). A criterion says which
weights go; those that stay are moved so that the outputs change least. Blocks are done in order, and each is calibrated
on the outputs of the pruned blocks before it. Memory holds one block, its inputs' statistics and some windows' activations.
For criteria that ask for gradients the model is run backwards first, as it came; see weight_gradients.
Papers: Frantar and Alistarh 2023, "SparseGPT"; Sun et al. 2023, "A Simple and Effective Pruning Approach for Large
Language Models" (Wanda); least squares on the weights left as in Meng et al. 2024, "ALPS".
Left out: training afterwards, which distill.logits does, and holds the zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from app.spec.architectures import architecture_in
from app.spec.prune import PruneCalibrated
from app.spec.report import Flag, LayerOutcome
from workers.engine.calibration.block_journal import open_journal
from workers.engine.calibration.block_stream import compute_dtype
from workers.engine.calibration.input_moments import warning_of_seldom_used
from workers.engine.calibration.step_calibration import (
    calibration_in,
    calibration_windows,
    is_short_of_memory,
    journal_key,
    solve_into,
    split_progress,
)
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.calibration.weight_gradients import WeightGradients, gather_gradients
from workers.engine.checkpoint import Checkpoint, copy_side_files
from workers.engine.checkpoint.selection import Selection, select_layers
from workers.engine.prune.allotment import allot
from workers.engine.prune.block_pruner import BlockPruner
from workers.engine.prune.layer_pruner import LayerPruner
from workers.engine.prune.sensitivity import Curves, SensitivityProbe, curves_of, merged
from workers.engine.quantize.found_layers import write_journal
from workers.engine.quantize.silent_channels import SilentChannels
from workers.engine.technique import StepContext, StepOutcome, implements

# Writing takes little of the time, running the model backwards most of it.
_SOLVING = 0.97
_BACKWARDS = 0.6
_OF_DEAD_INPUTS = {
    "sparsegpt": "Their weights count as worth nothing.",
    "wanda": "Their weights count as worth nothing.",
    "taylor": "Their weights count as worth nothing.",
    "gradient": "Their weights count as worth nothing.",
    "magnitude": "Their weights are judged by their size all the same.",
    "random": "Their weights are drawn as all others are.",
}


@implements(PruneCalibrated)
def prune_calibrated(step: PruneCalibrated, context: StepContext) -> StepOutcome:
    """Write `context.target` with the chosen layers pruned, everything else as it was.

    Raises InvalidRequest when the calibration text is too short, or a weight is not finite; JobFailed when the model's
    activations are not.
    """
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore)
    windows = calibration_windows(context, tokens=step.calibration_tokens, length=step.sequence_length)
    short = is_short_of_memory(step, context, checkpoint)
    key = journal_key(step, context, windows, one_site_at_a_time=short)
    with open_journal(context.journal, context.target.parent, key) as journal:
        stored = next(iter(selection.chosen.values())).dtype
        calibration = calibration_in(
            journal.directory, context, windows, share=_SOLVING, dtype=compute_dtype(stored, context.device)
        )
        pruner = BlockPruner(
            LayerPruner(
                step,
                inputs_first=architecture_in(checkpoint.config).inputs_first,
                is_short_of_memory=short,
                gradients=WeightGradients(journal.directory) if step.uses_gradients else None,
            ),
            {name: entry.dtype for name, entry in selection.chosen.items()},
            seed=context.seed,
        )
        curves: Curves = {}
        if step.runs_backwards:
            backward, calibration = split_progress(calibration, _BACKWARDS)
            probe = SensitivityProbe(pruner) if step.allocation == "sensitivity" else None
            gradients = gather_gradients(backward, selection.chosen, seed=context.seed, probe=probe)
            if probe is not None:
                costs = merged(gradients.probed())
                weights = {name: entry.fact.elements for name, entry in selection.chosen.items()}
                pruner = replace(pruner, allotted=allot(costs, weights, step.sparsity))
                curves = curves_of(costs, pruner.allotted, weights)
        solve_into(journal, calibration, pruner.prune)
        records = journal.records()
        write_journal(checkpoint, {}, journal, context, solving=_SOLVING)
    context.progress(1.0, "done")
    copy_side_files(context.source, context.target)
    return _outcome(
        selection,
        records,
        curves=curves,
        metrics={"calibration_tokens": windows.numel()},
        flags=(
            *calibration_flags(context, windows, tokens=step.calibration_tokens),
            *SilentChannels.joined(records).flags(dead_weights=_OF_DEAD_INPUTS[step.criterion]),
        ),
    )


def _outcome(
    selection: Selection,
    records: list[dict[str, Any]],
    *,
    curves: Curves,
    metrics: dict[str, float | int | str | None],
    flags: tuple[Flag, ...],
) -> StepOutcome:
    zeros = {name: count for record in records for name, count in record["zeros"].items()}
    errors = {name: found for record in records for name, found in record["weight_errors"].items()}
    layers = tuple(
        LayerOutcome(
            name=name,
            action="pruned",
            parameters=entry.fact.elements,
            sparsity=zeros[name] / entry.fact.elements,
            relative_error=_share(*errors[name]),
        )
        for name, entry in selection.chosen.items()
    )
    weights = sum(layer.parameters for layer in layers)
    seldom = {name: tokens for record in records for name, tokens in record["seldom_used"].items()}
    return StepOutcome(
        layers=(*layers, *selection.untouched),
        metrics=metrics
        | {
            "pruned_weights": weights,
            "sparsity": sum(zeros.values()) / weights,
            "relative_output_error": _share(
                sum(record["outputs_lost"] for record in records),
                sum(record["outputs_had"] for record in records),
            ),
        },
        warnings=(
            *selection.warnings,
            *(warning for record in records for warning in record["warnings"]),
            *warning_of_seldom_used(seldom, consequence="pruned as if all inputs were alike,"),
        ),
        flags=flags,
        curves=curves,
    )


def _share(lost: float, had: float) -> float:
    return (lost / had) ** 0.5 if had else 0.0
