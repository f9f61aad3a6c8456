"""Static int8 in standard operators: QuantizeLinear and DequantizeLinear around each product, for any reader of ONNX.

Activations are uint8 with one scale and zero point a tensor, weights int8 with a scale per output channel and no zero
point. Runtimes fuse such a group to one integer product (onnxruntime: MatMulIntegerToFloat). Where the channels of an
input are smoothed, the division goes into the norm that makes the input, or stands before its QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from workers.engine.export.onnx_graph import LinearNode, add_constant, replace_linear

LEVELS = 255


@dataclass(frozen=True)
class InputGrid:
    """How an input is rounded: x ≈ smoothing · scale · (q − zero), q of 0 to 255."""

    scale: float
    zero: int
    smoothing: NDArray[np.float32] | None
    """(features,): what each channel is divided by beforehand; None for nothing."""

    @classmethod
    def spanning(cls, low: float, high: float, smoothing: NDArray[np.float32] | None) -> InputGrid:
        """The grid whose ends are `low` ≤ 0 and `high` ≥ 0, zero exactly on it."""
        scale = max((high - low) / LEVELS, float(np.finfo(np.float32).tiny))
        return cls(scale, min(LEVELS, round(-low / scale)), smoothing)


@dataclass(frozen=True)
class Int8Matrix:
    """A weight (N, K) times its input's smoothing, as int8 codes and a positive scale per row."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    """(N,)"""
    input: InputGrid

    @property
    def stored_bits(self) -> float:
        """Bits per weight, scales and zero points included."""
        return 8 + 40 / int(self.codes.shape[1])


class QdqWriter:
    """Rewrites the linear layers of one graph; layers that share an input share its rounding."""

    def __init__(self, graph: ir.Graph, matrices: dict[str, Int8Matrix]) -> None:
        """`matrices` by the names of the weights in the graph."""
        self._graph = graph
        self._matrices = matrices
        self._rounded: dict[tuple[int, int], ir.Value] = {}

    def write(self, linears: dict[str, LinearNode]) -> None:
        """Put a product of dequantized values in the place of every layer that has a matrix."""
        for name, matrix in self._matrices.items():
            linear = linears[name]
            constants = (
                add_constant(self._graph, f"{name}_quantized", np.ascontiguousarray(matrix.codes.T)),
                add_constant(self._graph, f"{name}_scale", matrix.scales),
                add_constant(self._graph, f"{name}_zero_point", np.zeros(len(matrix.scales), dtype=np.int8)),
            )
            weight = ir.node("DequantizeLinear", constants, {"axis": 1}, name=f"{name}/dequantize")
            inputs = [self._rounded_input(linear, matrix.input), weight.outputs[0]]
            product = ir.node("MatMul", inputs, name=f"{name}/product")
            replace_linear(self._graph, linear, [weight, product])

    def _rounded_input(self, linear: LinearNode, grid: InputGrid) -> ir.Value:
        key = (id(linear.input), id(grid))
        if key not in self._rounded:
            self._rounded[key] = self._round(linear, grid)
        return self._rounded[key]

    def _round(self, linear: LinearNode, grid: InputGrid) -> ir.Value:
        name, x, nodes = f"{linear.weight}_input", linear.input, []
        if grid.smoothing is not None and not self._fold_into_norm(x, grid):
            factors = add_constant(self._graph, f"{name}_smoothing_scale", 1 / grid.smoothing)
            nodes.append(ir.node("Mul", [x, factors], name=f"{name}/smooth"))
            x = nodes[-1].outputs[0]
        scale = add_constant(self._graph, f"{name}_scale", np.asarray(grid.scale, dtype=np.float32))
        zero = add_constant(self._graph, f"{name}_zero_point", np.asarray(grid.zero, dtype=np.uint8))
        nodes.append(ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}/quantize"))
        codes = nodes[-1].outputs[0]
        nodes.append(ir.node("DequantizeLinear", [codes, scale, zero], name=f"{name}/dequantize"))
        self._graph.insert_before(linear.node, nodes)
        return nodes[-1].outputs[0]

    def _fold_into_norm(self, x: ir.Value, grid: InputGrid) -> bool:
        """Divide the weights of the norm that makes `x`, if nothing but layers of this grid read it."""
        producer = x.producer()
        if producer is None or producer.op_type not in ("Mul", "LayerNormalization"):
            return False
        if not all(self._reads_through(user, grid) for user in x.consumers()):
            return False
        places = [i for i, value in enumerate(producer.inputs) if _is_vector(value, grid)]
        wanted = [1, 2] if producer.op_type == "LayerNormalization" and len(producer.inputs) > 2 else places
        if not places or wanted != places:
            return False
        for place in places:
            vector = producer.inputs[place]
            if vector is None or vector.const_value is None:
                raise ValueError("a vector found above is gone")
            smoothed = vector.const_value.numpy() / grid.smoothing
            name = f"{vector.name}_smoothed_{producer.name or x.name}"
            producer.replace_input_with(place, add_constant(self._graph, name, smoothed.astype(np.float32)))
        return True

    def _reads_through(self, user: ir.Node, grid: InputGrid) -> bool:
        """Whether a node is the product of a layer whose input is on this grid."""
        weight = user.inputs[1] if len(user.inputs) > 1 else None
        producer = weight.producer() if weight is not None else None
        source = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else weight
        matrix = self._matrices.get(source.name or "") if source is not None else None
        return user.op_type in ("MatMul", "Gemm") and matrix is not None and matrix.input is grid


def _is_vector(value: ir.Value | None, grid: InputGrid) -> bool:
    """Whether it is a stored vector of one number for each channel."""
    if value is None or value.const_value is None or not value.is_initializer() or grid.smoothing is None:
        return False
    return tuple(value.const_value.shape.numpy()) == grid.smoothing.shape
