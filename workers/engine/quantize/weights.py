"""quantize.weights: round every linear layer's weights to an integer grid, one slab of rows at a time.

Idea: weights of trained layers are nearly Gaussian within a group, so a grid whose scale trades clipping against
rounding loses least (absmax of Dettmers et al. 2022; searched as in OmniQuant, Shao et al. 2023, and llama.cpp's
quantizers, without importance). Leaves out: calibration data, error compensation (GPTQ) and equalisation (AWQ).
A slab is read, fitted, packed and written by one thread and forgotten: memory does not grow with the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from app.spec.facts import TensorFact
from app.spec.quantize import QuantizeWeights
from workers.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Slab,
    copy_side_files,
    map_slabs,
    row_slabs,
    write_config,
)
from workers.engine.checkpoint.selection import non_finite, select_layers
from workers.engine.export.pack_quantized import (
    ROWS_PER_WORD_GROUP,
    PackedLayer,
    pack_columns,
    pack_rows,
)
from workers.engine.quantize.grid import fit_groups
from workers.engine.quantize.packed_layers import (
    WeightError,
    config_with_quantization,
    layer_outcomes,
    plan_layers,
    totals,
    warnings_of,
)
from workers.engine.technique import StepContext, StepOutcome, implements

# Weights fitted at once: three float32 buffers of this size stay in a core's own cache.
_CHUNK_WEIGHTS = 2**17


@implements(QuantizeWeights)
def quantize_weights(step: QuantizeWeights, context: StepContext) -> StepOutcome:
    """Write `context.target` with all linear layers inside blocks quantized, everything else as it was."""
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore)
    layers = plan_layers(checkpoint, selection, step)
    facts: list[TensorFact] = []
    slabs: list[Slab] = []
    for name, entry in checkpoint.tensors.items():
        layer = layers.get(name)
        facts += layer.facts() if layer else [entry.fact]
        slabs += row_slabs(entry, multiple=ROWS_PER_WORD_GROUP if layer else 1)

    errors: dict[str, list[WeightError]] = {name: [] for name in layers}
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:

        def work(slab: Slab, rows: Tensor) -> WeightError:
            layer = layers.get(slab.entry.name)
            if layer is None:
                writer.write_rows(slab.entry.name, slab.start, rows)
                return WeightError()
            return _quantize_slab(slab, rows, layer, step, writer)

        def progress(share: float) -> None:
            context.progress(share, f"quantizing to {step.bits} bits")

        for slab, error in map_slabs(checkpoint, slabs, work, threads=context.threads, progress=progress):
            if slab.entry.name in layers:
                errors[slab.entry.name].append(error)
    copy_side_files(context.source, context.target)
    write_config(context.target, config_with_quantization(checkpoint, step, selection))
    return StepOutcome(
        layers=layer_outcomes(layers, errors, selection),
        metrics=totals(layers, errors),
        warnings=warnings_of(layers, selection, checkpoint),
    )


def _quantize_slab(
    slab: Slab, rows: Tensor, layer: PackedLayer, step: QuantizeWeights, writer: CheckpointWriter
) -> WeightError:
    """Quantize rows (n, columns) of one layer and write codes, scales and zero points where they belong."""
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(rows.shape[0], layer.groups, dtype=rows.dtype)
    zeros = torch.empty(rows.shape[0], layer.groups, dtype=torch.int8)
    error = weights = 0.0
    size = max(1, _CHUNK_WEIGHTS // layer.columns)
    for start in range(0, rows.shape[0], size):
        part = slice(start, min(start + size, rows.shape[0]))
        groups = rows[part].float().reshape(-1, layer.group_size or layer.columns)
        norm = _finite_norm(groups, slab.entry.name)
        fit = fit_groups(groups, layer.grid, rows.dtype, search=step.scale_search == "mse")
        codes[part] = fit.codes.view(-1, layer.columns)
        scales[part] = fit.scale.view(-1, layer.groups)
        zeros[part] = fit.zero.view(-1, layer.groups)
        error += fit.squared_error.sum(dtype=torch.float64).item()
        weights += norm
    writer.write_rows(layer.packed.name, slab.start, pack_rows(codes, layer.bits))
    writer.write_rows(layer.scale.name, slab.start, scales)
    if not layer.symmetric:
        zero_row = slab.start * layer.bits // 32
        writer.write_rows(layer.zero_point.name, zero_row, pack_columns(zeros, layer.bits))
    if slab.start == 0:
        writer.write(layer.shape.name, torch.tensor([layer.rows, layer.columns]))
    return WeightError(error, weights)


def _finite_norm(groups: Tensor, name: str) -> float:
    """The squared norm of float32 weights. Raises InvalidRequest when one of them is not finite."""
    norm = groups.square().sum(dtype=torch.float64).item()
    # The norm of finite weights can overflow too, so only a suspicious one is worth the second look.
    if not math.isfinite(norm) and not torch.isfinite(groups).all():
        raise non_finite(name)
    return norm
