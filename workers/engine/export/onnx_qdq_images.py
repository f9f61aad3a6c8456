"""Static int8 for graphs of convolutions: QuantizeLinear and DequantizeLinear wherever a runtime joins integer operators.

onnxruntime computes a convolution in integers when its input, weight and bias are dequantized and its output (after a
Relu or Clip) is quantized, a Gemm whatever becomes of its output; a sum of two such tensors likewise, and a maximum where input and output share a scale. So
those outputs are rounded too, not inputs alone. Activations are uint8 with one scale and zero point a tensor, weights int8
with a scale per output channel, biases int32 in the product of both scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from workers.engine.export.onnx_graph import LinearNode, add_constant, linear_nodes
from workers.engine.export.onnx_qdq import InputGrid, Int8Matrix, QdqWriter
from workers.engine.quantize.forward_solver import Int8Weight

_ACTIVATIONS = ("Relu", "Clip")
# Half of int32, so that adding products cannot overflow.
_LARGEST_BIAS_CODE = 2**30


@dataclass(frozen=True)
class RoundedValues:
    """Which values of a graph are rounded."""

    values: tuple[str, ...]
    """Each with a range of its own."""
    sharing: Mapping[str, str]
    """Those that have the range of another: a maximum is among what it was taken of."""
    product_inputs: Mapping[str, str]
    """Inputs of products, by the names of the weights; only these read them rounded."""

    @property
    def ranged(self) -> tuple[str, ...]:
        """All whose range must be known."""
        return tuple(dict.fromkeys((*self.values, *self.product_inputs.values())))


def biased_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """Every Conv and Gemm, whose outputs come first in their weights and who add their bias themselves, by the weight's name."""
    return {
        _name(node.inputs[1]): node
        for node in graph
        if (node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", False)))
        and node.inputs[1] is not None
        and node.inputs[1].is_initializer()
    }


def product_nodes(graph: ir.Graph) -> dict[str, LinearNode]:
    """Every other product with a stored weight."""
    return {name: linear for name, linear in linear_nodes(graph).items() if linear.node.op_type == "MatMul"}


def rounded_values(graph: ir.Graph, weights: Iterable[str]) -> RoundedValues:
    """The values to round in a graph whose layers named in `weights` become int8."""
    chosen = set(weights)
    values: dict[str, None] = {}
    for node in [node for name, node in biased_nodes(graph).items() if name in chosen]:
        values[_name(node.inputs[0])] = None
        if node.op_type == "Conv":
            values[_name(_activated(node.outputs[0]))] = None
    sharing: dict[str, str] = {}
    for node in graph:
        known = [
            _name(value) in values or _name(value) in sharing for value in node.inputs if value is not None
        ]
        if node.op_type == "Add" and all(known):
            values[_name(_activated(node.outputs[0]))] = None
        if node.op_type == "MaxPool" and all(known):
            source = _name(node.inputs[0])
            sharing[_name(node.outputs[0])] = sharing.get(source, source)
            values.pop(_name(node.outputs[0]), None)
    products = {name: _name(node.input) for name, node in product_nodes(graph).items() if name in chosen}
    return RoundedValues(tuple(values), sharing, products)


def write_qdq(
    graph: ir.Graph, weights: Mapping[str, Int8Weight], rounded: RoundedValues, grids: Mapping[str, InputGrid]
) -> None:
    """Put int8 layers in the place of those named in `weights`; `grids` by the names of the values that are ranged."""
    matrices = {
        name: Int8Matrix(weights[name].codes, weights[name].scales, grids[source])
        for name, source in rounded.product_inputs.items()
    }
    QdqWriter(graph, matrices).write(product_nodes(graph))
    inputs = {name: _name(node.inputs[0]) for name, node in biased_nodes(graph).items() if name in weights}
    of_value = {name: grids[name] for name in rounded.values}
    of_value |= {name: grids[source] for name, source in rounded.sharing.items()}
    for value in [value for value in _all_values(graph) if value.name in of_value]:
        _round_value(graph, value, of_value[_name(value)])
    for name, node in biased_nodes(graph).items():
        if name in weights:
            _round_layer(graph, node, name, weights[name], of_value[inputs[name]])


def _activated(value: ir.Value) -> ir.Value:
    """The output of the activation that alone reads a value, or the value: the runtime joins it to what is before."""
    uses = value.uses()
    if len(uses) == 1 and not value.is_graph_output():
        (user,) = (use.node for use in uses)
        if user.op_type in _ACTIVATIONS:
            return user.outputs[0]
    return value


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _round_value(graph: ir.Graph, value: ir.Value, grid: InputGrid) -> None:
    """Have everything that reads a value read it rounded."""
    name = _name(value)
    scale = add_constant(graph, f"{name}_scale", np.asarray(grid.scale, dtype=np.float32))
    zero = add_constant(graph, f"{name}_zero_point", np.asarray(grid.zero, dtype=np.uint8))
    readers = [(use.node, use.idx) for use in value.uses()]
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}/quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}/dequantize")
    first = min((node for node, _ in readers), key=list(graph).index)
    graph.insert_before(first, [quantize, dequantize])
    for node, index in readers:
        node.replace_input_with(index, dequantize.outputs[0])


def _round_layer(graph: ir.Graph, node: ir.Node, name: str, weight: Int8Weight, grid: InputGrid) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    numbers = None if bias is None or bias.const_value is None else bias.const_value.numpy()
    if numbers is not None:
        weight = _coarse_enough(weight, numbers, grid)
    new = [_dequantized(graph, name, weight.codes, weight.scales)]
    node.replace_input_with(1, new[0].outputs[0])
    if numbers is not None:
        scales = weight.scales * np.float32(grid.scale)
        codes = np.rint(numbers.astype(np.float64) / scales).astype(np.int32)
        new.append(_dequantized(graph, _name(bias), codes, scales))
        node.replace_input_with(2, new[1].outputs[0])
    graph.insert_before(node, new)


def _coarse_enough(weight: Int8Weight, bias: np.ndarray, grid: InputGrid) -> Int8Weight:
    """The same with larger scales for channels so faint that their biases would not fit into 32 bits."""
    least = (np.abs(bias) / (_LARGEST_BIAS_CODE * grid.scale)).astype(np.float32)
    scales = np.maximum(weight.scales, least)
    if (scales == weight.scales).all():
        return weight
    ratio = (weight.scales / scales).reshape(-1, *(1,) * (weight.codes.ndim - 1))
    return replace(weight, codes=np.rint(weight.codes * ratio).astype(np.int8), scales=scales)


def _dequantized(graph: ir.Graph, name: str, codes: np.ndarray, scales: np.ndarray) -> ir.Node:
    """One scale for each row of the codes, and zero points of zero."""
    constants = (
        add_constant(graph, f"{name}_quantized", codes),
        add_constant(graph, f"{name}_scale", scales),
        add_constant(graph, f"{name}_zero_point", np.zeros(len(scales), dtype=codes.dtype)),
    )
    return ir.node("DequantizeLinear", constants, {"axis": 0}, name=f"{name}/dequantize")


def _name(value: ir.Value | None) -> str:
    if value is None or value.name is None:
        raise ValueError("a value without a name")
    return value.name
