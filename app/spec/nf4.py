"""NF4 as bitsandbytes stores it: how a weight is cut into blocks, and the entry that says so, from shapes alone.

Source: bitsandbytes 0.50, functional.py (`QuantState`, `quantize_4bit`); Dettmers et al. 2023, "QLoRA: Efficient Finetuning
of Quantized LLMs", sec. 3.
"""

from __future__ import annotations

import json
from typing import Final

from app.spec.facts import TensorFact

BLOCK: Final = 64
"""Weights that share a scale."""
SCALES_PER_BLOCK: Final = 256
"""Scales that share one of their own, with double quantization."""
LEVELS: Final = 16
SCALE_LEVELS: Final = 256
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def compute_dtype(stored: str) -> str:
    """What bitsandbytes is to compute in, for weights stored in such a dtype (safetensors' spelling)."""
    return _DTYPES.get(stored, "float32")


def quant_state(weight: TensorFact, *, double_quantized: bool) -> bytes:
    """The JSON of `quant_state.bitsandbytes__nf4` for a weight (rows, columns) as it was before: UTF-8."""
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": compute_dtype(weight.dtype),
        "shape": list(weight.shape),
    }
    if double_quantized:
        state |= {"nested_blocksize": SCALES_PER_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
    return json.dumps(state).encode()


def nf4_tensors(weight: TensorFact, *, double_quantized: bool) -> tuple[TensorFact, ...]:
    """What stands for a weight (rows, columns) in the file; the inputs are a multiple of BLOCK."""
    scales = weight.elements // BLOCK
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "": ("U8", (weight.elements // 2, 1)),
        ".absmax": ("U8" if double_quantized else "F32", (scales,)),
        ".quant_map": ("F32", (LEVELS,)),
    }
    if double_quantized:
        shapes |= {
            ".nested_absmax": ("F32", (-(-scales // SCALES_PER_BLOCK),)),
            ".nested_quant_map": ("F32", (SCALE_LEVELS,)),
        }
    state = quant_state(weight, double_quantized=double_quantized)
    shapes[".quant_state.bitsandbytes__nf4"] = ("U8", (len(state),))
    return tuple(
        TensorFact(name=weight.name + what, dtype=dtype, shape=shape)
        for what, (dtype, shape) in shapes.items()
    )
