"""Parameters of the optimization techniques."""

from __future__ import annotations

from typing import ClassVar, Literal

from app.spec.base import Format, Step


class OptimizeOnnx(Step):
    """Export to ONNX, optimize the graph, quantize to dynamic int8; each change is kept only if it measures faster.

    Every variant is timed in onnxruntime on this worker; the report lists all of them, the losers too.
    """

    produces: ClassVar[Format] = "onnx"

    technique: Literal["optimize.onnx"] = "optimize.onnx"
    graph_optimization: Literal["basic", "extended", "all"] = "all"
    """How far onnxruntime may rewrite the graph; `all` includes layouts specific to this worker's processor."""
    quantization: Literal["none", "int8_dynamic"] = "int8_dynamic"
    """`int8_dynamic`: int8 weights, activations quantized while running. Left out, faster or not, where the outputs'
    mean cosine with the original's falls below 0.98."""
    quantize_head: bool = False
    """Quantize the language-model head too. Smaller and faster, and can ruin quality: the evaluation will show it."""
