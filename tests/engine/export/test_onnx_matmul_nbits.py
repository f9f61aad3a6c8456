"""MatMulNBits as written, read back by the operator's specification alone, and run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import VerificationFailed
from workers.engine.export.onnx import open_session, run, save_graph
from workers.engine.export.onnx_coverage import check_coverage
from workers.engine.export.onnx_graph import linear_nodes, remove_unused
from workers.engine.export.onnx_matmul_nbits import MICROSOFT, multiply_packed, pack_matrix

_RNG = np.random.default_rng(5)
ROWS = 7
NAME = "layers.0.up.weight"


def dequantize(node: onnx.NodeProto, stored: dict[str, np.ndarray]) -> np.ndarray:
    """The weight (N, K) by the text of the operator: bit by bit, nothing shared with the writer."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    bits, block = sizes["bits"], sizes["block_size"]
    packed, scales = stored[node.input[1]], stored[node.input[2]]
    zeros = stored[node.input[3]] if len(node.input) > 3 else None
    weight = np.zeros((sizes["N"], sizes["K"]))
    for n in range(sizes["N"]):
        for k in range(sizes["K"]):
            blob = "".join(f"{byte:08b}"[::-1] for byte in packed[n, k // block])
            code = int(blob[(k % block) * bits : (k % block + 1) * bits][::-1], 2)
            zero = 2 ** (bits - 1)
            if zeros is not None:
                row = "".join(f"{byte:08b}"[::-1] for byte in zeros[n])
                zero = int(row[(k // block) * bits : (k // block + 1) * bits][::-1], 2)
            weight[n, k] = (code - zero) * float(scales[n, k // block])
    return weight


def _graph(columns: int, *, as_gemm: bool) -> ir.Model:
    """One linear layer with a bias: as Gemm, or as a product with a transposed weight and an addition."""
    nodes = (
        [helper.make_node("Gemm", ["x", NAME, "bias"], ["y"], transB=1)]
        if as_gemm
        else [
            helper.make_node("Transpose", [NAME], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ]
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", ROWS])],
        [
            numpy_helper.from_array(np.zeros((ROWS, columns), dtype=np.float32), NAME),
            numpy_helper.from_array(np.arange(ROWS, dtype=np.float32), "bias"),
        ],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def _written(
    directory: Path, columns: int, bits: int, block: int, *, symmetric: bool, as_gemm: bool
) -> np.ndarray:
    """Write random codes and return the weight they were meant to stand for."""
    half, blocks = 2 ** (bits - 1), -(-columns // block)
    codes = _RNG.integers(-half, half, (ROWS, columns)).astype(np.int16)
    zeros = None if symmetric else _RNG.integers(-half, half, (ROWS, blocks)).astype(np.int16)
    scales = _RNG.uniform(-0.1, 0.1, (ROWS, blocks)).astype(np.float32)
    model = _graph(columns, as_gemm=as_gemm)
    packed = pack_matrix(codes, scales, zeros, bits=bits, block_size=block)
    multiply_packed(model.graph, linear_nodes(model.graph)[NAME], packed)
    model.opset_imports[MICROSOFT] = 1
    remove_unused(model)
    save_graph(model, directory)
    group = np.arange(columns) // block
    return (codes - (0 if zeros is None else zeros[:, group])) * scales[:, group].astype(np.float64)


@pytest.mark.parametrize("as_gemm", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block", "columns"), [(4, 16, 48), (4, 32, 72), (8, 16, 40), (8, 64, 64)])
def test_stored_weight_is_what_the_specification_reads_and_onnxruntime_multiplies_by(
    bits: int, block: int, columns: int, *, symmetric: bool, as_gemm: bool, tmp_path: Path
) -> None:
    meant = _written(tmp_path / "g", columns, bits, block, symmetric=symmetric, as_gemm=as_gemm)
    graph = onnx.load(tmp_path / "g" / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (node,) = [node for node in graph.node if node.op_type == "MatMulNBits"]
    read = dequantize(node, stored)
    np.testing.assert_allclose(read, meant, rtol=1e-6, atol=1e-9)
    # One input at a time: a one survives the operator's own rounding of its inputs to int8.
    output = run(open_session(tmp_path / "g", threads=1), {"x": np.eye(columns, dtype=np.float32)})
    np.testing.assert_allclose(output, read.T + np.arange(ROWS), rtol=1e-5, atol=1e-5)


def test_bits_are_those_of_the_stored_arrays() -> None:
    codes, zeros = np.zeros((ROWS, 40), dtype=np.int16), np.zeros((ROWS, 3), dtype=np.int16)
    packed = pack_matrix(codes, np.ones((ROWS, 3), dtype=np.float32), zeros, bits=4, block_size=16)
    # Three blocks of 16 at 4 bits, three scales of 32 bits, three zero points in two bytes; 40 weights.
    assert packed.stored_bits == pytest.approx((3 * 64 + 3 * 32 + 16) / 40)


def test_a_layer_left_in_floating_point_without_leave_is_named(tmp_path: Path) -> None:
    save_graph(_graph(32, as_gemm=False), tmp_path / "float")
    check_coverage(tmp_path / "float" / "model.onnx", [], [NAME])
    with pytest.raises(VerificationFailed, match=r"floating point for \['layers.0.up.weight'\]"):
        check_coverage(tmp_path / "float" / "model.onnx", [], [])
    with pytest.raises(VerificationFailed, match=r"no integer product for \['layers.0.up.weight'\]"):
        check_coverage(tmp_path / "float" / "model.onnx", [NAME], [])


def test_a_quantized_layer_counts_as_such(tmp_path: Path) -> None:
    _written(tmp_path / "g", 32, 4, 16, symmetric=True, as_gemm=True)
    check_coverage(tmp_path / "g" / "model.onnx", [NAME], [])
