"""Which layers of a checkpoint a step works on, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import architecture_in, is_compressible, is_image_layer, is_router
from app.spec.head import NO_OWN_HEAD, own_head
from app.spec.report import LayerOutcome
from workers.engine.checkpoint.layout import TensorEntry
from workers.engine.checkpoint.reader import Checkpoint

_ROUTER = "a router: small, and an error in it sends tokens to other experts"
_OUTSIDE = "outside the blocks: packed files hold the linear layers inside them"
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Selection:
    """Chosen and untouched add up to all compressible layers, and the head if chosen; by the name of the weight."""

    chosen: dict[str, TensorEntry]
    untouched: tuple[LayerOutcome, ...]
    warnings: tuple[str, ...]
    """Patterns that match nothing: most likely a spelling mistake."""


def module_name(weight: str) -> str:
    """The module a weight belongs to, which is what users' patterns match."""
    return weight.removesuffix(".weight")


def select_layers(
    checkpoint: Checkpoint, ignore: Sequence[str], *, with_head: bool = False, everywhere: bool = False
) -> Selection:
    """Choose the compressible layers that no pattern of `ignore` matches, and the head where asked for.

    `everywhere`: convolutions too, and linear layers outside the blocks, of an image classifier.

    Raises UnsupportedForModel for a model that is quantized already, or has no head of its own; InvalidRequest when no
    layer is left.
    """
    if "quantization_config" in checkpoint.config:
        raise UnsupportedForModel(
            "The model is already quantized.",
            code="already_quantized",
            hint="Upload the original model in 32 or 16 bits.",
        )
    chosen: dict[str, TensorEntry] = {}
    is_layer = is_image_layer if everywhere else is_compressible
    untouched = [] if everywhere else _outside_blocks(checkpoint)
    for entry in checkpoint.tensors.values():
        if not is_layer(entry.name, entry.shape):
            continue
        pattern = next((p for p in ignore if fnmatchcase(module_name(entry.name), p)), None)
        if is_router(entry.name):
            untouched.append(_untouched(entry, _ROUTER))
        elif pattern is None:
            chosen[entry.name] = _floating(entry)
        else:
            untouched.append(_untouched(entry, f"ignored by {pattern!r} in the spec"))
    if not chosen:
        raise InvalidRequest(
            "No layer is left to work on.", code="nothing_to_do", hint="Shorten the step's ignore list."
        )
    if with_head:
        head = _head(checkpoint)
        chosen[head.name] = _floating(head)
    modules = [module_name(name) for name in (*chosen, *(layer.name for layer in untouched))]
    unused = [p for p in ignore if not any(fnmatchcase(module, p) for module in modules)]
    warnings = tuple(f"ignore pattern {pattern!r} matches no layer" for pattern in unused)
    return Selection(chosen, tuple(untouched), warnings)


def non_finite(name: str) -> InvalidRequest:
    """The error for a weight that holds NaN or infinity."""
    return InvalidRequest(
        f"{name} holds weights that are NaN or infinite.",
        code="non_finite_weights",
        hint="The model is broken, often by training in 16 bits: upload a checkpoint from before.",
    )


def _outside_blocks(checkpoint: Checkpoint) -> list[LayerOutcome]:
    """The layers of an image classifier that are in no block; those of other models count as embeddings and heads."""
    if not architecture_in(checkpoint.config).takes_images:
        return []
    return [
        _untouched(entry, _OUTSIDE)
        for name, entry in checkpoint.tensors.items()
        if is_image_layer(name, entry.shape) and not is_compressible(name, entry.shape)
    ]


def _head(checkpoint: Checkpoint) -> TensorEntry:
    head = own_head(checkpoint.facts(), architecture_in(checkpoint.config))
    # A copy that lies in the file all the same is not read.
    if head is None or checkpoint.config.get("tie_word_embeddings"):
        raise UnsupportedForModel(NO_OWN_HEAD, hint="Set include_head to false.")
    return checkpoint.tensors[head.name]


def _floating(entry: TensorEntry) -> TensorEntry:
    if entry.dtype not in _FLOATS:
        raise UnsupportedForModel(
            f"{entry.name} is stored as {entry.dtype}, not as floating point of 16 bits or more.",
            code="unsupported_dtype",
            hint="Upload the original model in 32 or 16 bits.",
        )
    return entry


def _untouched(entry: TensorEntry, reason: str) -> LayerOutcome:
    return LayerOutcome(name=entry.name, action="untouched", reason=reason, parameters=entry.fact.elements)
