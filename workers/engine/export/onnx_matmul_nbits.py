"""MatMulNBits: a product with a weight of 4 or 8 bits and a scale per block of inputs, as onnxruntime defines it.

B is uint8 (N, blocks, block·bits/8), consecutive inputs of a block in consecutive bits, lowest first; scales are
(N, blocks); zero points are uint8 (N, ⌈blocks·bits/8⌉), packed like B along a row, and 2^(bits−1) where there are none.
w = s·(q − z). The last block of a row is filled up; what fills it is multiplied by nothing.
Biases stay what they are: an addition after the product. onnxruntime's own quantizer sees a MatMul alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from workers.engine.export.onnx_graph import LinearNode, add_constant, replace_linear, replace_node

MICROSOFT = "com.microsoft"
# The product may round its input to int8, a scale per block: at 8 bits the only fast kernel (accuracy level 0 took 5
# times float32's time for one token, this 0.3), at 4 bits no loss that could be measured.
_ACCURACY_INT8 = 4


@dataclass(frozen=True)
class PackedMatrix:
    """A weight (N, K) as the operator reads it."""

    rows: int
    columns: int
    bits: int
    block_size: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    @property
    def stored_bits(self) -> float:
        """Bits per weight, scales, zero points and filling included."""
        zeros = 0 if self.zero_points is None else self.zero_points.nbytes
        return 8 * (self.codes.nbytes + self.scales.nbytes + zeros) / (self.rows * self.columns)


def pack_matrix(
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    zeros: NDArray[np.int16] | None,
    *,
    bits: int,
    block_size: int,
) -> PackedMatrix:
    """Pack signed codes (N, K) of −2^(bits−1) … 2^(bits−1) − 1 with scales and zero points (N, blocks) in the same range."""
    rows, columns = codes.shape
    half, blocks = 1 << (bits - 1), scales.shape[1]
    whole = np.zeros((rows, blocks * block_size), dtype=np.int16)
    whole[:, :columns] = codes
    packed = _packed_rows(whole + half, bits).reshape(rows, blocks, block_size * bits // 8)
    zero_points = None if zeros is None else _packed_rows(zeros + half, bits)
    return PackedMatrix(rows, columns, bits, block_size, packed, scales, zero_points)


def multiply_packed(graph: ir.Graph, linear: LinearNode, packed: PackedMatrix) -> None:
    """Put a MatMulNBits in the place of a linear layer's product."""
    name = linear.weight
    inputs = [
        linear.input,
        add_constant(graph, f"{name}_quantized", packed.codes),
        add_constant(graph, f"{name}_scale", packed.scales),
    ]
    if packed.zero_points is not None:
        inputs.append(add_constant(graph, f"{name}_zero_point", packed.zero_points))
    sizes = {
        "K": packed.columns,
        "N": packed.rows,
        "bits": packed.bits,
        "block_size": packed.block_size,
        "accuracy_level": _ACCURACY_INT8,
    }
    product = ir.node("MatMulNBits", inputs, sizes, domain=MICROSOFT, name=f"{name}/product")
    replace_linear(graph, linear, [product])


def look_up_packed(graph: ir.Graph, embedding: ir.Node, weight: str, packed: PackedMatrix) -> None:
    """Let an embedding look its rows up in the 8-bit table that a tied head multiplies by: it is stored once.

    The table's columns must be a multiple of the block size.
    """
    table = graph.initializers[f"{weight}_quantized"]
    shape = add_constant(
        graph, f"{weight}_table_shape", np.asarray([packed.rows, packed.columns], dtype=np.int64)
    )
    flat = ir.node("Reshape", [table, shape], name="embedding/table")
    settings = {"bits": packed.bits, "block_size": packed.block_size, "gather_axis": 0, "quantize_axis": 1}
    rows = ir.node(
        "GatherBlockQuantized",
        [flat.outputs[0], embedding.inputs[1], graph.initializers[f"{weight}_scale"]],
        settings,
        domain=MICROSOFT,
        name="embedding/rows",
    )
    replace_node(graph, embedding, [flat, rows], embedding.outputs[0])


def _packed_rows(codes: NDArray[np.int16], bits: int) -> NDArray[np.uint8]:
    """Unsigned codes (rows, n) -> (rows, ⌈n·bits/8⌉), the first in the low bits."""
    small = codes.astype(np.uint8)
    if bits == 8:
        return small
    if small.shape[1] % 2:
        small = np.pad(small, ((0, 0), (0, 1)))
    return np.bitwise_or(small[:, 0::2], np.left_shift(small[:, 1::2], np.uint8(4)), dtype=np.uint8)
