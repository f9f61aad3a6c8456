"""quantize.weights: round every linear layer's weights to an integer grid, one slab of rows at a time.

Idea: weights of trained layers are nearly Gaussian within a group, so a grid whose scale trades clipping against
rounding loses least (absmax of Dettmers et al. 2022; searched as in OmniQuant, Shao et al. 2023, and llama.cpp's
quantizers, without importance). Leaves out: calibration data, error compensation (GPTQ) and equalisation (AWQ).
A slab is read, fitted, packed and written by one thread and forgotten: memory does not grow with the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.errors import InvalidRequest
from app.spec.architectures import ARCHITECTURES, block_index
from app.spec.base import Family
from app.spec.facts import TensorFact
from app.spec.quantize import QuantizeWeights
from app.spec.report import LayerOutcome
from workers.engine.checkpoint import (
    DTYPE_NAMES,
    Checkpoint,
    CheckpointWriter,
    Slab,
    copy_side_files,
    map_slabs,
    row_slabs,
    write_config,
)
from workers.engine.checkpoint.selection import Selection, module_name, non_finite, select_layers
from workers.engine.export.pack_quantized import (
    ROWS_PER_WORD_GROUP,
    PackedLayer,
    pack_columns,
    pack_rows,
    quantization_config,
)
from workers.engine.quantize.grid import Grid, fit_groups
from workers.engine.technique import StepContext, StepOutcome, implements

# Weights fitted at once: three float32 buffers of this size stay in a core's own cache.
_CHUNK_WEIGHTS = 2**17

_FEW_BITS_WARNING = (
    "vLLM runs packed integers of 4 and 8 bits only; transformers loads these and computes in floating point"
)


@dataclass(frozen=True)
class SlabError:
    """Squared norms over a slab."""

    of_error: float = 0.0
    of_weights: float = 0.0


@implements(QuantizeWeights)
def quantize_weights(step: QuantizeWeights, context: StepContext) -> StepOutcome:
    """Write `context.target` with all linear layers inside blocks quantized, everything else as it was."""
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore)
    layers = _plan(selection, step)
    facts: list[TensorFact] = []
    slabs: list[Slab] = []
    for name, entry in checkpoint.tensors.items():
        layer = layers.get(name)
        facts += layer.facts() if layer else [entry.fact]
        slabs += row_slabs(entry, multiple=ROWS_PER_WORD_GROUP if layer else 1)

    errors: dict[str, list[SlabError]] = {name: [] for name in layers}
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:

        def work(slab: Slab, rows: Tensor) -> SlabError:
            layer = layers.get(slab.entry.name)
            if layer is None:
                writer.write_rows(slab.entry.name, slab.start, rows)
                return SlabError()
            return _quantize_slab(slab, rows, layer, step, writer)

        def progress(share: float) -> None:
            context.progress(share, f"quantizing to {step.bits} bits")

        for slab, error in map_slabs(checkpoint, slabs, work, threads=context.threads, progress=progress):
            if slab.entry.name in layers:
                errors[slab.entry.name].append(error)
    copy_side_files(context.source, context.target)
    write_config(context.target, _config(checkpoint, step, selection))
    return _outcome(step, selection, layers, errors)


def _plan(selection: Selection, step: QuantizeWeights) -> dict[str, PackedLayer]:
    """What each chosen weight becomes. Raises InvalidRequest if the group size does not divide a layer's inputs."""
    layers = {
        name: PackedLayer(
            module=module_name(name),
            rows=entry.shape[0],
            columns=entry.shape[1],
            dtype=DTYPE_NAMES[entry.dtype],
            bits=step.bits,
            symmetric=step.symmetric,
            group_size=step.group_size,
        )
        for name, entry in selection.chosen.items()
    }
    if step.group_size is not None:
        _check_group_size(list(layers.values()), step.group_size)
    return layers


def _quantize_slab(
    slab: Slab, rows: Tensor, layer: PackedLayer, step: QuantizeWeights, writer: CheckpointWriter
) -> SlabError:
    """Quantize rows (n, columns) of one layer and write codes, scales and zero points where they belong."""
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(rows.shape[0], layer.groups, dtype=rows.dtype)
    zeros = torch.empty(rows.shape[0], layer.groups, dtype=torch.int8)
    error = weights = 0.0
    grid = Grid(step.bits, step.symmetric)
    size = max(1, _CHUNK_WEIGHTS // layer.columns)
    for start in range(0, rows.shape[0], size):
        part = slice(start, min(start + size, rows.shape[0]))
        groups = rows[part].float().reshape(-1, layer.group_size or layer.columns)
        norm = _finite_norm(groups, slab.entry.name)
        fit = fit_groups(groups, grid, rows.dtype, search=step.scale_search == "mse")
        codes[part] = fit.codes.view(-1, layer.columns)
        scales[part] = fit.scale.view(-1, layer.groups)
        zeros[part] = fit.zero.view(-1, layer.groups)
        error += fit.squared_error.sum(dtype=torch.float64).item()
        weights += norm
    writer.write_rows(layer.packed.name, slab.start, pack_rows(codes, step.bits))
    writer.write_rows(layer.scale.name, slab.start, scales)
    if not step.symmetric:
        writer.write_rows(layer.zero_point.name, slab.start * step.bits // 32, pack_columns(zeros, step.bits))
    if slab.start == 0:
        writer.write(layer.shape.name, torch.tensor([layer.rows, layer.columns]))
    return SlabError(error, weights)


def _finite_norm(groups: Tensor, name: str) -> float:
    """The squared norm of float32 weights. Raises InvalidRequest when one of them is not finite."""
    norm = groups.square().sum(dtype=torch.float64).item()
    # The norm of finite weights can overflow too, so only a suspicious one is worth the second look.
    if not math.isfinite(norm) and not torch.isfinite(groups).all():
        raise non_finite(name)
    return norm


def _check_group_size(layers: list[PackedLayer], group_size: int) -> None:
    wrong = [layer for layer in layers if layer.columns % group_size]
    if not wrong:
        return
    fitting = math.gcd(*(layer.columns for layer in layers))
    sizes = [size for size in range(8, group_size, 8) if fitting % size == 0]
    names = ", ".join(f"{layer.module} ({layer.columns} inputs)" for layer in wrong[:5])
    raise InvalidRequest(
        f"Groups of {group_size} do not divide the inputs of {len(wrong)} layers: {names}"
        + (", …." if len(wrong) > 5 else "."),
        code="group_size_does_not_divide",
        hint=(f"group_size {sizes[-1]} divides all layers. " if sizes else "")
        + "Null gives one scale per output channel and always fits; or put these layers on the ignore list.",
    )


def _config(checkpoint: Checkpoint, step: QuantizeWeights, selection: Selection) -> dict[str, Any]:
    architecture = ARCHITECTURES.get((checkpoint.config.get("architectures") or ["?"])[0])
    by_pattern = architecture is not None and architecture.family is Family.ENCODER
    left = [module_name(layer.name) for layer in selection.untouched]
    return checkpoint.config | {
        "quantization_config": quantization_config(
            bits=step.bits,
            symmetric=step.symmetric,
            group_size=step.group_size,
            ignored_modules=[_ignore_entry(module, by_pattern=by_pattern) for module in left],
        )
    }


def _ignore_entry(module: str, *, by_pattern: bool) -> str:
    """The module's name, or a pattern for it: an encoder's prefix depends on the class that loads it."""
    if not by_pattern:
        return module
    tail = module[module.index(f".{block_index(module)}.") :].replace(".", r"\.")
    return rf"re:.*\blayer{tail}$"


def _outcome(
    step: QuantizeWeights,
    selection: Selection,
    layers: dict[str, PackedLayer],
    errors: dict[str, list[SlabError]],
) -> StepOutcome:
    quantized = tuple(
        LayerOutcome(
            name=name,
            action="quantized",
            parameters=layer.rows * layer.columns,
            bits=layer.stored_bits(),
            relative_error=_relative(errors[name]),
        )
        for name, layer in layers.items()
    )
    weights = sum(layer.parameters for layer in quantized)
    stored = sum(layer.stored_bits() * layer.rows * layer.columns for layer in layers.values())
    return StepOutcome(
        layers=(*quantized, *selection.untouched),
        metrics={
            "quantized_weights": weights,
            "stored_bits": stored / weights,
            "relative_error": _relative([error for parts in errors.values() for error in parts]),
        },
        warnings=selection.warnings + ((_FEW_BITS_WARNING,) if step.bits < 4 else ()),
    )


def _relative(errors: list[SlabError]) -> float:
    weights = sum(error.of_weights for error in errors)
    return math.sqrt(sum(error.of_error for error in errors) / weights) if weights else 0.0
