"""quantize.calibrated: few-bit weights chosen by what they do to each layer's outputs, on inputs from calibration text.

Idea: with the second moments H of a layer's inputs, the error of its outputs is tr(ΔW H ΔWᵀ). Scales are searched with
diag H as importance; the columns are rounded one after the other, and what one loses is corrected by those that follow
(GPTQ); then scales and codes are refined together. Blocks are done in order, and each is calibrated on the outputs of
the quantized blocks before it. Memory holds one block, its inputs' statistics and one window's activations.
Papers: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers";
coordinate descent on the codes as in Behdin et al. 2023, "QuantEase".
Left out: matching the outputs of the original rather than of the quantized blocks before (GPTAQ, which measured worse).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from app.spec.kv_cache import cache_scale_facts
from app.spec.quantize import QuantizeCalibrated
from app.spec.report import Flag
from workers.engine.calibration.block_journal import BlockJournal, open_journal
from workers.engine.calibration.block_stream import LiveBlock, compute_dtype
from workers.engine.calibration.input_moments import warning_of_seldom_used
from workers.engine.calibration.step_calibration import (
    calibration_in,
    calibration_windows,
    is_short_of_memory,
    journal_key,
    solve_into,
)
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.checkpoint import (
    Checkpoint,
    copy_side_files,
    write_config,
)
from workers.engine.checkpoint.selection import select_layers
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.images.calibration import calibration_image_flags, calibration_pixels
from workers.engine.quantize.block_solver import BlockSolver
from workers.engine.quantize.cache_scales import cache_scales
from workers.engine.quantize.found_layers import write_journal
from workers.engine.quantize.packed_layers import (
    WeightError,
    config_with_quantization,
    layer_outcomes,
    plan_layers,
    totals,
    warnings_of,
)
from workers.engine.quantize.silent_channels import SilentChannels
from workers.engine.technique import StepContext, StepOutcome, implements

# Writing what was found takes little of the time.
_SOLVING = 0.97


@implements(QuantizeCalibrated)
def quantize_calibrated(step: QuantizeCalibrated, context: StepContext) -> StepOutcome:
    """Write `context.target` with all linear layers inside blocks quantized, everything else as it was.

    Raises InvalidRequest when the calibration text is too short, or a weight is not finite; JobFailed when the model's
    activations are not.
    """
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore, with_head=step.include_head)
    layers = plan_layers(checkpoint, selection, step)
    windows = _windows(step, context)
    short = is_short_of_memory(step, context, checkpoint)
    key = journal_key(step, context, windows, one_site_at_a_time=short)
    with open_journal(context.journal, context.target.parent, key) as journal:
        _solve(step, context, layers, windows, journal, one_site_at_a_time=short)
        records = journal.records()
        head_errors = write_journal(checkpoint, layers, journal, context, solving=_SOLVING)
    context.progress(1.0, "done")
    copy_side_files(context.source, context.target)
    write_config(
        context.target,
        config_with_quantization(checkpoint, layers, selection, scales_cache=step.kv_cache != "none"),
    )
    errors = head_errors | {
        name: [WeightError(*found)] for record in records for name, found in record["weight_errors"].items()
    }
    lost, had = (sum(record[key] for record in records) for key in ("outputs_lost", "outputs_had"))
    return StepOutcome(
        layers=layer_outcomes(layers, errors, selection),
        metrics=totals(layers, errors)
        | {
            "relative_output_error": (lost / had) ** 0.5 if had else 0.0,
            "calibration_images" if windows.is_floating_point() else "calibration_tokens": _amount(windows),
        }
        | _tuning_metrics([record["tuning"] for record in records if record["tuning"]]),
        warnings=(
            *warnings_of(layers, selection, checkpoint),
            *(warning for record in records for warning in record["warnings"]),
            *warning_of_seldom_used(
                {name: tokens for record in records for name, tokens in record["seldom_used"].items()},
                consequence="rounded to nearest",
            ),
        ),
        flags=(
            *_flags(step, context, windows),
            *SilentChannels.joined(records).flags(dead_weights="Their weights are rounded to nearest."),
        ),
    )


def _windows(step: QuantizeCalibrated, context: StepContext) -> Tensor:
    """What the model is run on: windows of tokens, or images."""
    if context.facts.preprocessing is not None:
        return torch.from_numpy(calibration_pixels(context, step.calibration_images))
    return calibration_windows(context, tokens=step.calibration_tokens, length=step.sequence_length)


def _amount(windows: Tensor) -> int:
    return len(windows) if windows.is_floating_point() else windows.numel()


def _flags(step: QuantizeCalibrated, context: StepContext, windows: Tensor) -> Iterable[Flag]:
    if windows.is_floating_point():
        return calibration_image_flags(len(windows), wanted=step.calibration_images)
    return calibration_flags(context, windows, tokens=step.calibration_tokens)


def _tuning_metrics(found: list[tuple[float, float]]) -> dict[str, float | int | str | None]:
    """What tuning left of the blocks' squared errors, on average over the blocks that were tuned."""
    shares = [after / before if before else 1.0 for before, after in found]
    return {"error_left_by_tuning": sum(shares) / len(shares)} if shares else {}


def _solve(
    step: QuantizeCalibrated,
    context: StepContext,
    layers: dict[str, StoredLayer],
    windows: Tensor,
    journal: BlockJournal,
    *,
    one_site_at_a_time: bool,
) -> None:
    """Quantize block after block into the journal, from the first that is not finished."""
    checkpoint = Checkpoint.open(context.source)
    stored = checkpoint.tensors[next(iter(layers))].dtype
    calibration = calibration_in(
        journal.directory, context, windows, share=_SOLVING, dtype=compute_dtype(stored, context.device)
    )
    solver = BlockSolver(
        step,
        layers,
        context.threads,
        one_site_at_a_time=one_site_at_a_time,
        seed=context.seed,
    )

    def solve(block: LiveBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
        done = solver.solve(block)
        # Seen after the weights have changed: these are the keys and values that will be cached.
        scales = {} if step.kv_cache == "none" else cache_scales(block, cache_scale_facts(checkpoint.facts()))
        return done.tensors | scales, done.record()

    solve_into(journal, calibration, solve)
