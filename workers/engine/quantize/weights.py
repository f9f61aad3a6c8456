"""quantize.weights: round every linear layer's weights to a grid of few numbers, one slab of rows at a time.

Idea: weights of trained layers are nearly Gaussian within a group, so a grid whose scale trades clipping against
rounding loses least (absmax of Dettmers et al. 2022; searched as in OmniQuant, Shao et al. 2023, and llama.cpp's
quantizers, without importance). Leaves out: calibration data, error compensation (GPTQ) and equalisation (AWQ).
A slab is read, fitted, packed and written by one thread and forgotten: memory does not grow with the model. Grids whose
scale depends on the whole weight (fp8 with one scale, nvfp4) take a pass over the weights before that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.spec.architectures import architecture_in
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
from workers.engine.checkpoint.selection import select_layers
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.quantize.grid import WeightGrid
from workers.engine.quantize.largest_weights import largest_weights
from workers.engine.quantize.packed_layers import (
    WeightError,
    config_with_quantization,
    fused_layers,
    layer_outcomes,
    plan_layers,
    totals,
    warnings_of,
)
from workers.engine.quantize.silent_channels import SilentChannels, ZeroOutputs, carrying_outputs
from workers.engine.quantize.slab_rounding import round_slab
from workers.engine.technique import StepContext, StepOutcome, implements

# The pass that looks for the largest weights only reads.
_LOOKING = 0.1
_NOTHING = torch.empty(0)


@implements(QuantizeWeights)
def quantize_weights(step: QuantizeWeights, context: StepContext) -> StepOutcome:
    """Write `context.target` with all linear layers inside blocks quantized, everything else as it was."""
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore, with_head=step.include_head)
    layers = plan_layers(checkpoint, selection, step)
    facts: list[TensorFact] = []
    slabs: list[Slab] = []
    for name, entry in checkpoint.tensors.items():
        layer = layers.get(name)
        facts += layer.facts() if layer else [entry.fact]
        slabs += row_slabs(entry, multiple=layer.row_multiple if layer else 1)

    grids, looked = _grids(checkpoint, layers, context)
    errors: dict[str, list[WeightError]] = {name: [] for name in layers}
    inputs_first = architecture_in(checkpoint.config).inputs_first
    zeros = {name: ZeroOutputs(inputs_first) for name in layers}
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:

        def work(slab: Slab, rows: Tensor) -> tuple[WeightError, Tensor]:
            layer = layers.get(slab.entry.name)
            if layer is None:
                writer.write_rows(slab.entry.name, slab.start, rows)
                return WeightError(), _NOTHING
            error = round_slab(slab, rows, layer, grids[slab.entry.name], step.scale_search, writer)
            return error, carrying_outputs(rows, inputs_first=inputs_first)

        def progress(share: float) -> None:
            context.progress(looked + (1 - looked) * share, f"quantizing to {step.bits} bits")

        for slab, (error, found) in map_slabs(
            checkpoint, slabs, work, threads=context.threads, progress=progress
        ):
            if slab.entry.name in layers:
                errors[slab.entry.name].append(error)
                zeros[slab.entry.name].add(found)
    silent = SilentChannels()
    for name, outputs in zeros.items():
        silent.add_zero_outputs(name, outputs.count)
    copy_side_files(context.source, context.target)
    write_config(context.target, config_with_quantization(checkpoint, layers, selection))
    return StepOutcome(
        layers=layer_outcomes(layers, errors, selection),
        metrics=totals(layers, errors),
        warnings=warnings_of(layers, selection, checkpoint),
        flags=silent.flags(dead_weights=""),
    )


def _grids(
    checkpoint: Checkpoint, layers: dict[str, StoredLayer], context: StepContext
) -> tuple[dict[str, WeightGrid], float]:
    """The grid of each weight, by its name, and the share of the work that finding them was."""
    needing = {layer.module: name for name, layer in layers.items() if layer.needs_peak}
    peaks = dict.fromkeys(layers, 0.0) | largest_weights(
        checkpoint,
        needing.values(),
        threads=context.threads,
        progress=lambda share: context.progress(_LOOKING * share, "looking for the largest weights"),
    )
    for modules in fused_layers(needing):
        names = [needing[module] for module in modules]
        peaks |= dict.fromkeys(names, max(peaks[name] for name in names))
    return {name: layer.grid(peaks[name]) for name, layer in layers.items()}, _LOOKING if needing else 0.0
