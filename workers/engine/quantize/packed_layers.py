"""What all techniques that write packed integers share: which layer becomes what, the config, and what they report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import architecture_in, block_index, is_compressible
from app.spec.base import Family
from app.spec.layouts import limits_of_layout
from app.spec.quantize import IntegerWeights
from app.spec.report import LayerOutcome
from workers.engine.checkpoint import DTYPE_NAMES, Checkpoint
from workers.engine.checkpoint.layout import TensorEntry
from workers.engine.checkpoint.selection import Selection, module_name
from workers.engine.export.pack_quantized import PackedLayer, quantization_config

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


def plan_layers(checkpoint: Checkpoint, selection: Selection, step: IntegerWeights) -> dict[str, PackedLayer]:
    """What each chosen weight becomes.

    Raises UnsupportedForModel for a layout that no runtime would read packed, InvalidRequest if the group size does not
    divide a layer's inputs.
    """
    compressible = [fact for fact in checkpoint.facts() if is_compressible(fact.name, fact.shape)]
    for _, why in limits_of_layout(step, architecture_in(checkpoint.config), compressible):
        raise UnsupportedForModel(why, hint="Submitting the job anew says the same before it starts.")
    layers = {name: _planned(entry, step) for name, entry in selection.chosen.items()}
    _check_group_sizes(list(layers.values()))
    return layers


def _planned(entry: TensorEntry, step: IntegerWeights) -> PackedLayer:
    settings = step.settings_of(module_name(entry.name))
    return PackedLayer(
        module=module_name(entry.name),
        rows=entry.shape[0],
        columns=entry.shape[1],
        dtype=DTYPE_NAMES[entry.dtype],
        bits=settings.bits,
        symmetric=settings.symmetric,
        group_size=settings.group_size,
    )


def config_with_quantization(
    checkpoint: Checkpoint, step: IntegerWeights, selection: Selection
) -> dict[str, Any]:
    """The model's config.json with the entry that loaders of compressed-tensors go by."""
    architecture = architecture_in(checkpoint.config)
    by_pattern = architecture.family is Family.ENCODER
    left = [module_name(layer.name) for layer in selection.untouched]
    return checkpoint.config | {
        "quantization_config": quantization_config(
            bits=step.bits,
            symmetric=step.symmetric,
            group_size=step.group_size,
            ignored_modules=[_ignore_entry(module, by_pattern=by_pattern) for module in left],
            unpack_to_load=architecture.unpack_to_load,
        )
    }


def _ignore_entry(module: str, *, by_pattern: bool) -> str:
    """The module's name, or a pattern for it: an encoder's prefix depends on the class that loads it."""
    if not by_pattern:
        return module
    tail = module[module.index(f".{block_index(module)}.") :].replace(".", r"\.")
    return rf"re:.*\blayers?{tail}$"


def layer_outcomes(
    layers: dict[str, PackedLayer], errors: dict[str, list[WeightError]], selection: Selection
) -> tuple[LayerOutcome, ...]:
    """Every compressible layer, quantized or not; `errors` by the names of the weights."""
    quantized = (
        LayerOutcome(
            name=name,
            action="quantized",
            parameters=layer.rows * layer.columns,
            bits=layer.stored_bits(),
            relative_error=_relative(errors[name]),
        )
        for name, layer in layers.items()
    )
    return (*quantized, *selection.untouched)


def totals(
    layers: dict[str, PackedLayer], errors: dict[str, list[WeightError]]
) -> dict[str, float | int | str | None]:
    """Figures over all quantized layers: weights, stored bits per weight, ‖W' − W‖ / ‖W‖."""
    weights = sum(layer.rows * layer.columns for layer in layers.values())
    stored = sum(layer.stored_bits() * layer.rows * layer.columns for layer in layers.values())
    return {
        "quantized_weights": weights,
        "stored_bits": stored / weights,
        "relative_error": _relative([error for parts in errors.values() for error in parts]),
    }


def warnings_of(
    layers: dict[str, PackedLayer], selection: Selection, checkpoint: Checkpoint
) -> tuple[str, ...]:
    """What a user should know about the layers chosen, the bits and the layout."""
    few = any(layer.bits < 4 for layer in layers.values())
    return (
        *selection.warnings,
        *((_FEW_BITS_WARNING,) if few else ()),
        *((_TRANSPOSED_WARNING,) if architecture_in(checkpoint.config).inputs_first else ()),
    )


def _check_group_sizes(layers: list[PackedLayer]) -> None:
    wrong = [layer for layer in layers if layer.columns % (layer.group_size or 1)]
    if not wrong:
        return
    group_size = wrong[0].group_size or 1
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


def _relative(errors: list[WeightError]) -> float:
    weights = sum(error.of_weights for error in errors)
    return math.sqrt(sum(error.of_error for error in errors) / weights) if weights else 0.0
