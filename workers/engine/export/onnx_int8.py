"""Dynamic int8 in an ONNX graph: int8 weights, activations quantized while running.

Two layouts, because neither wins everywhere (onnxruntime 1.32, one core with AVX512-VNNI, against float32):

- `tensor`: MatMulInteger. One scale per output channel, one scale and zero point for *all* activations of a product.
  2.2 times as fast; MiniLM's token cosine .991, but SmolLM2-135M's perplexity goes from 49 to 84: a few tokens of a
  language model have activations a hundred times larger than the rest, and one scale must span them.
- `blocks`: MatMulNBits of 8 bits. One scale per 64 inputs, of weights and of activations alike. 1.3 times as fast;
  perplexity 49.1 → 49.5.

The arithmetic of `tensor` is that of onnxruntime.quantization.quantize_dynamic (per channel, symmetric), without its
passage through temporary files and four copies of the model. Embeddings become int8 rows with a scale each. Left out:
static activation scales, which need calibration, and SmoothQuant, which would let `tensor` serve language models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from workers.engine.export.onnx_graph import (
    LinearNode,
    add_constant,
    linear_nodes,
    remove_unused,
    replace_linear,
    replace_node,
    token_embedding,
)

Layout = Literal["tensor", "blocks"]
BLOCK = 64
_MICROSOFT = "com.microsoft"
# MatMulNBits may compute in int8: activations are quantized block by block.
_ACCURACY_INT8 = 4


@dataclass(frozen=True)
class Quantized:
    """What became of one weight: bits per weight with scales, and ‖W' − W‖ / ‖W‖."""

    bits: float
    relative_error: float


def quantize_graph(
    model: ir.Model, weights: Mapping[str, NDArray[np.float32]], layout: Layout
) -> dict[str, Quantized]:
    """Quantize the linear layers named in `weights`, each (out, in), in place; the result has every one found.

    The token embedding follows if no product in float32 needs it any more.
    """
    linears = {name: node for name, node in linear_nodes(model.graph).items() if name in weights}
    quantize = _as_tensor if layout == "tensor" else _as_blocks
    found = {name: quantize(model.graph, node, weights[name]) for name, node in linears.items()}
    if layout == "blocks":
        model.opset_imports[_MICROSOFT] = 1
    quantize_embedding(model.graph)
    remove_unused(model)
    return found


def int8_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 with one scale per row: (rows, columns) -> codes (rows, columns), scales (rows, 1)."""
    peak = np.abs(weight).max(axis=1, keepdims=True, initial=0.0)
    scale = (np.where(peak > 0, peak, 1.0) / 127).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def int8_blocks(weight: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Symmetric int8 with one scale per BLOCK inputs, the last block filled up with zeros.

    (out, in) -> codes + 128 (out, blocks, BLOCK), scales (out, blocks), as MatMulNBits wants them.
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), dtype=np.float32)
    padded[:, :columns] = weight
    codes, scale = int8_rows(padded.reshape(rows * blocks, BLOCK))
    shifted = (codes.astype(np.int16) + 128).astype(np.uint8)
    return shifted.reshape(rows, blocks, BLOCK), scale.reshape(rows, blocks)


def _as_tensor(graph: ir.Graph, linear: LinearNode, weight: NDArray[np.float32]) -> Quantized:
    codes, scale = int8_rows(weight)
    name = linear.weight
    matrix = add_constant(graph, f"{name}_quantized", np.ascontiguousarray(codes.T))
    scales = add_constant(graph, f"{name}_scale", scale[:, 0])
    zeros = add_constant(graph, f"{name}_zero_point", np.zeros(len(codes), dtype=np.int8))
    activations = _quantized_input(graph, linear)
    codes_in, scale_in, zero_in = activations.outputs
    product = ir.node("MatMulInteger", [codes_in, matrix, zero_in, zeros], name=f"{name}/product")
    as_float = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/float")
    both = ir.node("Mul", [scale_in, scales], name=f"{name}/scales")
    result = ir.node("Mul", [as_float.outputs[0], both.outputs[0]], name=f"{name}/scaled")
    replace_linear(graph, linear, [product, as_float, both, result])
    return Quantized(8 + 40 / weight.shape[1], _relative_error(weight, codes * scale))


def _as_blocks(graph: ir.Graph, linear: LinearNode, weight: NDArray[np.float32]) -> Quantized:
    codes, scale = int8_blocks(weight)
    rows, columns = weight.shape
    name = linear.weight
    packed = add_constant(graph, f"{name}_quantized", codes)
    scales = add_constant(graph, f"{name}_scale", scale)
    sizes = {
        "K": columns,
        "N": rows,
        "bits": 8,
        "block_size": BLOCK,
        "accuracy_level": _ACCURACY_INT8,
    }
    product = ir.node(
        "MatMulNBits", [linear.input, packed, scales], sizes, domain=_MICROSOFT, name=f"{name}/product"
    )
    replace_linear(graph, linear, [product])
    restored = (codes.astype(np.float32) - 128) * scale[:, :, None]
    stored_bits = (codes.size * 8 + scale.size * 32) / weight.size
    return Quantized(stored_bits, _relative_error(weight, restored.reshape(rows, -1)[:, :columns]))


def _quantized_input(graph: ir.Graph, linear: LinearNode) -> ir.Node:
    """The DynamicQuantizeLinear of a layer's input, shared by all layers that read the same."""
    for user in linear.input.consumers():
        if user.op_type == "DynamicQuantizeLinear":
            return user
    node = ir.node(
        "DynamicQuantizeLinear", [linear.input], num_outputs=3, name=f"{linear.input.name}/quantize"
    )
    for value, suffix in zip(node.outputs, ("quantized", "scale", "zero_point"), strict=True):
        value.name = f"{linear.input.name}/{suffix}"
    graph.insert_before(linear.node, node)
    return node


def quantize_embedding(graph: ir.Graph) -> None:
    """Look up int8 rows and their scales instead of float32 rows: a quarter of the bytes, and no product changes."""
    gather = token_embedding(graph)
    table = gather.inputs[0] if gather is not None else None
    if gather is None or table is None or table.const_value is None:
        return
    if table.name in linear_nodes(graph):
        return
    codes, scale = int8_rows(table.const_value.numpy())
    ids = gather.inputs[1]
    rows = ir.node(
        "Gather", [add_constant(graph, f"{table.name}_rows_quantized", codes), ids], name="embedding/rows"
    )
    scales = ir.node(
        "Gather", [add_constant(graph, f"{table.name}_rows_scale", scale), ids], name="embedding/scales"
    )
    as_float = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT}, name="embedding/float")
    result = ir.node("Mul", [as_float.outputs[0], scales.outputs[0]], name="embedding/scaled")
    replace_node(graph, gather, [rows, scales, as_float, result], gather.outputs[0])


def _relative_error(weight: NDArray[np.float32], restored: NDArray[Any]) -> float:
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(restored - weight)) / norm if norm else 0.0
