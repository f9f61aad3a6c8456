"""Count the weights an ONNX graph stands for, packed ones included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def count_onnx(path: Path) -> tuple[int, int, list[tuple[str, int]]]:
    """Weights of a graph, those of them stored in 8 bits or fewer, and the bytes of each tensor by name.

    External data stays on disk.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    types = onnx.TensorProto
    low_bit_types = {types.INT8, types.UINT8, types.INT4, types.UINT4, types.FLOAT8E4M3FN, types.FLOAT8E5M2}
    float_types = {types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE}
    four_bit_types = {types.INT4, types.UINT4}
    packed, inside_packed = _packed_by_nodes(graph)
    parameters = low_bit = packed
    sizes: list[tuple[str, int]] = []
    for tensor in graph.initializer:
        bits = 4 if tensor.data_type in four_bit_types else 8 * _itemsize(tensor.data_type)
        sizes.append((tensor.name, math.prod(tensor.dims) * bits // 8))
        if tensor.name in inside_packed or tensor.name.endswith(("_scale", "_zero_point")):
            continue
        if tensor.data_type in low_bit_types:
            low_bit += math.prod(tensor.dims)
        if tensor.data_type in low_bit_types | float_types:
            parameters += math.prod(tensor.dims)
    return parameters, low_bit, sizes


def _itemsize(data_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _packed_by_nodes(graph: Any) -> tuple[int, set[str]]:
    """Weights inside MatMulNBits nodes, N×K each, and the initializers that hold them."""
    weights, names = 0, set[str]()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            weights += sizes["K"] * sizes["N"]
            names.update(node.input[1:])
    return weights, names
