"""The tensors that a quantized weight becomes in compressed-tensors' formats and in bitsandbytes', from shapes alone."""

from __future__ import annotations

from app.spec.facts import TensorFact
from app.spec.nf4 import nf4_tensors
from app.spec.quantize import FP8_BLOCK, WeightSettings

_PACKED_WORD_BITS = 32

Shapes = list[tuple[str, str, tuple[int, ...]]]
"""What it is, its dtype in safetensors' spelling, and its shape."""


def stored_tensors(weight: TensorFact, settings: WeightSettings) -> tuple[TensorFact, ...]:
    """What stands for one weight of (rows, columns) in the file."""
    if settings.number_format == "nf4":
        return nf4_tensors(weight, double_quantized=settings.double_quantized)
    if settings.number_format in ("mxfp4", "nvfp4"):
        shapes = _halves(weight, settings)
    elif settings.number_format == "fp8" or settings.activations != "none":
        shapes = _bytes(weight, settings)
    else:
        shapes = _words(weight, settings)
    module = weight.name.removesuffix(".weight")
    return tuple(
        TensorFact(name=f"{module}.{what}", dtype=dtype, shape=shape) for what, dtype, shape in shapes
    )


def _words(weight: TensorFact, settings: WeightSettings) -> Shapes:
    rows, columns = weight.shape
    groups = columns // settings.group_size if isinstance(settings.group_size, int) else 1
    found: Shapes = [
        ("weight_packed", "I32", (rows, _words_of(columns, settings.bits))),
        ("weight_scale", weight.dtype, (rows, groups)),
        ("weight_shape", "I64", (2,)),
    ]
    if not settings.symmetric:
        found.append(("weight_zero_point", "I32", (_words_of(rows, settings.bits), groups)))
    return found


def _bytes(weight: TensorFact, settings: WeightSettings) -> Shapes:
    rows, columns = weight.shape
    blocks = (-(-rows // FP8_BLOCK), columns // FP8_BLOCK)
    scales = {"tensor": (1,), "block": blocks}.get(str(settings.group_size), (rows, 1))
    found: Shapes = [
        ("weight", "F8_E4M3" if settings.number_format == "fp8" else "I8", (rows, columns)),
        ("weight_scale", weight.dtype, scales),
    ]
    return [*found, ("input_scale", weight.dtype, (1,))] if settings.activations == "static" else found


def _halves(weight: TensorFact, settings: WeightSettings) -> Shapes:
    rows, columns = weight.shape
    packed = ("weight_packed", "U8", (rows, columns // 2))
    groups = (rows, columns // settings.divisor)
    if settings.number_format == "mxfp4":
        return [packed, ("weight_scale", "U8", groups)]
    found: Shapes = [packed, ("weight_scale", "F8_E4M3", groups), ("weight_global_scale", "F32", (1,))]
    return [*found, ("input_global_scale", "F32", (1,))] if settings.activations == "dynamic" else found


def _words_of(codes: int, bits: int) -> int:
    return -(-codes * bits // _PACKED_WORD_BITS)
