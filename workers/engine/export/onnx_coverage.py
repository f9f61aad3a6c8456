"""Which weights a written ONNX file multiplies in integers, and which in floating point: read from the file alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from app.errors import VerificationFailed
from app.spec.architectures import block_index

_QUANTIZED = "_quantized"


def check_coverage(path: Path, quantized: Collection[str], left: Collection[str]) -> None:
    """Check that the weights named in `quantized` are read as integers, and those inside blocks by nothing else.

    `left` are the weights of blocks that may stay in floating point. Raises VerificationFailed with the names of others.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    integer, floating = products(graph)
    missing = sorted(set(quantized) - integer)
    unexpected = sorted(name for name in floating - set(left) if block_index(name) is not None)
    if missing or unexpected:
        raise VerificationFailed(
            f"The ONNX file does not hold what was quantized: no integer product for {missing or 'none'}, products in"
            f" floating point for {unexpected or 'none'}.",
            code="onnx_coverage",
            hint="Report this with the model's configuration; quantize.weights works without ONNX.",
        )


def check_image_coverage(path: Path, quantized: Collection[str], left: Collection[str]) -> None:
    """Check that the convolutions and products of an image classifier are in integers but for those that were to be left.

    Counted as in integers is what reads a rounded weight and rounded inputs. Raises VerificationFailed.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    integer, floating = _image_products(graph)
    if integer != set(quantized) or not floating <= set(left):
        raise VerificationFailed(
            "The ONNX file does not hold what was quantized: no integer product for "
            f"{sorted(set(quantized) - integer) or 'none'}, products in floating point for {sorted(floating - set(left)) or 'none'}.",
            code="onnx_coverage",
            hint="Report this with the model's configuration.",
        )


def _image_products(graph: Any) -> tuple[set[str], set[str]]:
    """The weights of convolutions and products: those that meet rounded inputs as integers, and the others."""
    stored = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    integer, floating = set[str](), set[str]()
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        given, weight = (producers.get(name) for name in node.input[:2])
        source = node.input[1] if weight is None else next(iter(weight.input), "")
        if source in stored:
            is_rounded = all(p is not None and p.op_type == "DequantizeLinear" for p in (given, weight))
            (integer if is_rounded else floating).add(source.removesuffix(_QUANTIZED))
    return integer, floating


def products(graph: Any) -> tuple[set[str], set[str]]:
    """The weights that products of a graph read: those stored as integers, and those stored in floating point."""
    stored = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    integer, floating = set[str](), set[str]()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            integer.add(node.input[1].removesuffix(_QUANTIZED))
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        for name in node.input[:2]:
            producer = producers.get(name)
            source = producer.input[0] if producer is not None and producer.input else name
            if stored.get(source) != 2:
                continue
            is_rounded = producer is not None and producer.op_type == "DequantizeLinear"
            (integer if is_rounded else floating).add(source.removesuffix(_QUANTIZED))
    return integer, floating
