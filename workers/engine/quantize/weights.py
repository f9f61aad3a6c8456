"""quantize.weights: round every linear layer's weights to an integer grid, one slab of rows at a time.

Idea: weights of trained layers are nearly Gaussian within a group, so a grid whose scale trades clipping against
rounding loses least (absmax of Dettmers et al. 2022; searched as in OmniQuant, Shao et al. 2023, and llama.cpp's
quantizers, without importance). Leaves out: calibration data, error compensation (GPTQ) and equalisation (AWQ).
A slab is read, fitted, packed and written by one thread and forgotten: memory does not grow with the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import ARCHITECTURES, block_index, is_compressible
from app.spec.base import Family
from app.spec.facts import TensorFact
from app.spec.quantize import QuantizeWeights
from app.spec.report import LayerOutcome
from workers.engine.checkpoint import (
    DTYPE_NAMES,
    Checkpoint,
    CheckpointWriter,
    Slab,
    TensorEntry,
    copy_side_files,
    map_slabs,
    row_slabs,
    write_config,
)
from workers.engine.export.pack_quantized import (
    ROWS_PER_WORD_GROUP,
    PackedLayer,
    pack_columns,
    pack_rows,
    quantization_config,
)
from workers.engine.quantize.grid import Grid, fit_groups
from workers.engine.technique import StepContext, StepOutcome, implements

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
# Weights fitted at once: three float32 buffers of this size stay in a core's own cache.
_CHUNK_WEIGHTS = 2**17


@dataclass(frozen=True)
class SlabError:
    """Squared norms over a slab."""

    of_error: float = 0.0
    of_weights: float = 0.0


@implements(QuantizeWeights)
def quantize_weights(step: QuantizeWeights, context: StepContext) -> StepOutcome:
    """Write `context.target` with all linear layers inside blocks quantized, everything else as it was."""
    checkpoint = Checkpoint.open(context.source)
    layers = plan_layers(checkpoint, step)
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
    write_config(context.target, _config(checkpoint, step, layers))
    return _outcome(checkpoint, step, layers, errors)


def plan_layers(checkpoint: Checkpoint, step: QuantizeWeights) -> dict[str, PackedLayer]:
    """The weights that will be quantized, by tensor name. Raises InvalidRequest if the step does not fit the model."""
    if "quantization_config" in checkpoint.config:
        raise UnsupportedForModel(
            "The model is already quantized.",
            code="already_quantized",
            hint="Upload the original model in 32 or 16 bits.",
        )
    layers: dict[str, PackedLayer] = {}
    for entry in _compressible(checkpoint):
        module = _module(entry.name)
        if _ignored_by(module, step) is not None:
            continue
        if entry.dtype not in _FLOATS:
            raise UnsupportedForModel(
                f"{entry.name} is stored as {entry.dtype}, not as floating point of 16 bits or more.",
                code="unsupported_dtype",
                hint="Upload the original model in 32 or 16 bits.",
            )
        rows, columns = entry.shape
        layers[entry.name] = PackedLayer(
            module, rows, columns, DTYPE_NAMES[entry.dtype], step.bits, step.symmetric, step.group_size
        )
    if not layers:
        raise InvalidRequest(
            "No layer is left to quantize.", code="nothing_to_do", hint="Shorten the step's ignore list."
        )
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
        raise InvalidRequest(
            f"{name} holds weights that are NaN or infinite.",
            code="non_finite_weights",
            hint="The model is broken, often by training in 16 bits: upload a checkpoint from before.",
        )
    return norm


def _check_group_size(layers: list[PackedLayer], group_size: int | None) -> None:
    if group_size is None:
        return
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


def _config(checkpoint: Checkpoint, step: QuantizeWeights, layers: dict[str, PackedLayer]) -> dict[str, Any]:
    left = [entry.name for entry in _compressible(checkpoint) if entry.name not in layers]
    architecture = ARCHITECTURES.get((checkpoint.config.get("architectures") or ["?"])[0])
    by_pattern = architecture is not None and architecture.family is Family.ENCODER
    return checkpoint.config | {
        "quantization_config": quantization_config(
            bits=step.bits,
            symmetric=step.symmetric,
            group_size=step.group_size,
            ignored_modules=[_ignore_entry(_module(name), by_pattern=by_pattern) for name in left],
        )
    }


def _ignore_entry(module: str, *, by_pattern: bool) -> str:
    """The module's name, or a pattern for it: an encoder's prefix depends on the class that loads it."""
    if not by_pattern:
        return module
    tail = module[module.index(f".{block_index(module)}.") :].replace(".", r"\.")
    return rf"re:.*\blayer{tail}$"


def _outcome(
    checkpoint: Checkpoint,
    step: QuantizeWeights,
    layers: dict[str, PackedLayer],
    errors: dict[str, list[SlabError]],
) -> StepOutcome:
    outcomes = []
    for entry in _compressible(checkpoint):
        module, layer = _module(entry.name), layers.get(entry.name)
        parameters = math.prod(entry.shape)
        if layer is None:
            reason = f"ignored by {_ignored_by(module, step)!r} in the spec"
            outcomes.append(
                LayerOutcome(name=module, action="untouched", reason=reason, parameters=parameters)
            )
            continue
        outcomes.append(
            LayerOutcome(
                name=module,
                action="quantized",
                parameters=parameters,
                bits=layer.stored_bits(),
                relative_error=_relative(errors[entry.name]),
            )
        )
    unused = [p for p in step.ignore if not any(fnmatchcase(o.name, p) for o in outcomes)]
    done = list(layers.values())
    weights = sum(layer.rows * layer.columns for layer in done)
    bits = sum(layer.stored_bits() * layer.rows * layer.columns for layer in done) / weights
    overall = _relative([error for parts in errors.values() for error in parts])
    return StepOutcome(
        layers=tuple(outcomes),
        metrics={"quantized_weights": weights, "stored_bits": bits, "relative_error": overall},
        warnings=tuple(f"ignore pattern {pattern!r} matches no layer" for pattern in unused),
    )


def _relative(errors: list[SlabError]) -> float:
    weights = sum(error.of_weights for error in errors)
    return math.sqrt(sum(error.of_error for error in errors) / weights) if weights else 0.0


def _compressible(checkpoint: Checkpoint) -> list[TensorEntry]:
    return [entry for entry in checkpoint.tensors.values() if is_compressible(entry.name, entry.shape)]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _ignored_by(module: str, step: QuantizeWeights) -> str | None:
    return next((pattern for pattern in step.ignore if fnmatchcase(module, pattern)), None)
