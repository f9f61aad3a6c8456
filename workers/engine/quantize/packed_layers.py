"""What all techniques share that write compressed-tensors or NF4: which layer becomes what, the config, and what they report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import Architecture, architecture_in, block_index, is_compressible
from app.spec.base import Family
from app.spec.layouts import limits_of_layout
from app.spec.quantize import QuantizedWeights, WeightSettings
from app.spec.report import LayerOutcome
from workers.engine.architectures.names import name_in_memory
from workers.engine.checkpoint import DTYPE_NAMES, Checkpoint
from workers.engine.checkpoint.layout import TensorEntry
from workers.engine.checkpoint.selection import Selection, module_name
from workers.engine.export.fp4_packed import Fp4Layer
from workers.engine.export.nf4_packed import Nf4Layer, declaration
from workers.engine.export.pack_quantized import PackedLayer
from workers.engine.export.plain_quantized import PlainLayer
from workers.engine.export.stored_layer import StoredLayer, quantization_config

# Layers that vLLM runs as one: their scheme must be the same, and so must a scale of the whole weight.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
_FEW_BITS_WARNING = (
    "vLLM runs packed integers of 4 and 8 bits only; transformers loads these and computes in floating point"
)
_TRANSPOSED_WARNING = (
    "scales run along outputs, one set for each input, as the architecture stores its weights; transformers 5.23 loads "
    "these and computes in floating point, vLLM does not load them"
)


@dataclass(frozen=True)
class WeightError:
    """Squared norms over some weights, and over what was done to them."""

    of_error: float = 0.0
    of_weights: float = 0.0


def plan_layers(
    checkpoint: Checkpoint, selection: Selection, step: QuantizedWeights
) -> dict[str, StoredLayer]:
    """What each chosen weight becomes, by its name.

    Raises UnsupportedForModel for a layout that no runtime would read packed, InvalidRequest if the group size does not
    divide a layer's inputs, or the settings cannot be mixed.
    """
    compressible = [fact for fact in checkpoint.facts() if is_compressible(fact.name, fact.shape)]
    for _, why in limits_of_layout(step, architecture_in(checkpoint.config), compressible):
        raise UnsupportedForModel(why, hint="Submitting the job anew says the same before it starts.")
    step = step.with_group_size_for(entry.shape[1] for entry in selection.chosen.values())
    settings = {name: step.settings_of(module_name(name)) for name in selection.chosen}
    layers = {name: planned_layer(selection.chosen[name], found) for name, found in settings.items()}
    _check_group_sizes(list(layers.values()))
    if len(set(settings.values())) > 1 and not all(found.symmetric for found in settings.values()):
        raise InvalidRequest(
            "Layers are stored in different ways, some of them with zero points: transformers cannot load such a model.",
            code="mixed_zero_points",
            hint="Set symmetric to true, in the step and in its overrides.",
        )
    return layers


def planned_layer(entry: TensorEntry, settings: WeightSettings) -> StoredLayer:
    """What a weight becomes that is to be stored so."""
    module, dtype = module_name(entry.name), DTYPE_NAMES[entry.dtype]
    rows, columns = entry.shape
    bits, size, activations = settings.bits, settings.group_size, settings.activations
    if settings.number_format in ("mxfp4", "nvfp4"):
        divisor = settings.divisor
        return Fp4Layer(module, rows, columns, dtype, bits, divisor, settings.number_format, activations)
    if settings.number_format == "nf4":
        return Nf4Layer(module, rows, columns, dtype, bits, settings.divisor, settings.double_quantized)
    if settings.number_format == "fp8":
        strategy = size if isinstance(size, str) else "channel"
        group = settings.divisor if strategy == "block" else None
        return PlainLayer(module, rows, columns, dtype, bits, group, "float", strategy, activations)
    if activations != "none":
        return PlainLayer(module, rows, columns, dtype, bits, None, "int", "channel", activations)
    group = size if isinstance(size, int) else None
    return PackedLayer(module, rows, columns, dtype, bits, group, settings.symmetric)


def config_with_quantization(
    checkpoint: Checkpoint,
    layers: Mapping[str, StoredLayer],
    selection: Selection,
    *,
    scales_cache: bool = False,
) -> dict[str, Any]:
    """The model's config.json with the entry that loaders of compressed-tensors or bitsandbytes go by."""
    architecture = architecture_in(checkpoint.config)
    by_pattern = architecture.family is Family.ENCODER
    left = [_in_memory(module_name(layer.name), architecture) for layer in selection.untouched]
    in_nf4 = {name: layer for name, layer in layers.items() if isinstance(layer, Nf4Layer)}
    if in_nf4:
        return checkpoint.config | {"quantization_config": declaration(in_nf4, left)}
    declared = quantization_config(
        list(layers.values()),
        left,
        target=lambda module: _target(_in_memory(module, architecture), by_pattern=by_pattern),
        unpack_to_load=architecture.unpack_to_load,
        scales_cache=scales_cache,
    )
    return checkpoint.config | {"quantization_config": declared}


def _in_memory(module: str, architecture: Architecture) -> str:
    """What loaders call a module when they look it up in the entry."""
    return module_name(name_in_memory(f"{module}.weight", architecture.name))


def fused_layers(modules: Iterable[str]) -> list[list[str]]:
    """Modules by those that are served as one, in order; most stand alone."""
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        parent, _, name = module.rpartition(".")
        together[parent, next((parts[0] for parts in _FUSED if name in parts), name)].append(module)
    return list(together.values())


def _target(module: str, *, by_pattern: bool) -> str:
    """The module's name, or a pattern for it: an encoder's prefix depends on the class that loads it."""
    if not by_pattern:
        return module
    tail = module[module.index(f".{block_index(module)}.") :].replace(".", r"\.")
    return rf"re:.*\blayers?{tail}$"


def layer_outcomes(
    layers: Mapping[str, StoredLayer], errors: dict[str, list[WeightError]], selection: Selection
) -> tuple[LayerOutcome, ...]:
    """Every compressible layer, quantized or not; `errors` by the names of the weights."""
    quantized = (
        LayerOutcome(
            name=name,
            action="quantized",
            parameters=layer.rows * layer.columns,
            bits=layer.stored_bits(),
            relative_error=relative_error(errors[name]),
        )
        for name, layer in layers.items()
    )
    return (*quantized, *selection.untouched)


def totals(
    layers: Mapping[str, StoredLayer], errors: dict[str, list[WeightError]]
) -> dict[str, float | int | str | None]:
    """Figures over all quantized layers: weights, stored bits per weight, ‖W' − W‖ / ‖W‖."""
    weights = sum(layer.rows * layer.columns for layer in layers.values())
    stored = sum(layer.stored_bits() * layer.rows * layer.columns for layer in layers.values())
    return {
        "quantized_weights": weights,
        "stored_bits": stored / weights,
        "relative_error": relative_error([error for parts in errors.values() for error in parts]),
    }


def warnings_of(
    layers: Mapping[str, StoredLayer], selection: Selection, checkpoint: Checkpoint
) -> tuple[str, ...]:
    """What a user should know about the layers chosen, the bits and the layout."""
    found = list(selection.warnings)
    if any(layer.bits < 4 for layer in layers.values()):
        found.append(_FEW_BITS_WARNING)
    if architecture_in(checkpoint.config).inputs_first:
        found.append(_TRANSPOSED_WARNING)
    schemes = {layer.module: repr(layer.scheme()) for layer in layers.values()}
    left = {module_name(layer.name): "as it was" for layer in selection.untouched}
    unlike = [
        names for names in fused_layers(schemes | left) if len({(schemes | left)[n] for n in names}) > 1
    ]
    if unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        found.append(
            f"vLLM runs {', '.join(unlike[0])}{more} as one and cannot load them stored in different ways"
        )
    return tuple(found)


def _check_group_sizes(layers: list[StoredLayer]) -> None:
    wrong = [layer for layer in layers if layer.columns % (layer.group_size or 1)]
    if not wrong:
        return
    group_size = wrong[0].group_size or 1
    fitting = math.gcd(*(layer.columns for layer in layers))
    sizes = [size for size in range(8, group_size, 8) if fitting % size == 0]
    names = ", ".join(f"{layer.module} ({layer.columns} inputs)" for layer in wrong[:5])
    hint = "Put these layers on the ignore list"
    if isinstance(wrong[0], PackedLayer):
        fits = f"group_size {sizes[-1]} divides all layers. " if sizes else ""
        hint = f"{fits}Null gives one scale per output channel and always fits. {hint}"
    raise InvalidRequest(
        f"Groups of {group_size} do not divide the inputs of {len(wrong)} layers: {names}"
        + (", …." if len(wrong) > 5 else "."),
        code="group_size_does_not_divide",
        hint=f"{hint}, or choose another number_format.",
    )


def relative_error(errors: list[WeightError]) -> float:
    """‖W' − W‖ / ‖W‖ over all parts."""
    weights = sum(error.of_weights for error in errors)
    return math.sqrt(sum(error.of_error for error in errors) / weights) if weights else 0.0
