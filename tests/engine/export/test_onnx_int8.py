from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from workers.engine.export.onnx import MODEL_FILE, open_session, run, save_graph
from workers.engine.export.onnx_graph import linear_nodes, multiply_in_place, token_embedding
from workers.engine.export.onnx_int8 import BLOCK, Layout, int8_blocks, int8_rows, quantize_graph

VOCABULARY, HIDDEN, WIDE, LABELS = 50, 80, 96, 7
_RNG = np.random.default_rng(0)
WEIGHTS = {
    "embed.weight": _RNG.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32),
    "layers.0.up.weight": _RNG.standard_normal((WIDE, HIDDEN)).astype(np.float32),
    "layers.0.gate.weight": _RNG.standard_normal((WIDE, HIDDEN)).astype(np.float32),
    "layers.0.down.weight": _RNG.standard_normal((HIDDEN, WIDE)).astype(np.float32),
}
BIAS = _RNG.standard_normal(HIDDEN).astype(np.float32)
IDS = _RNG.integers(0, VOCABULARY, (2, 11))
IN_BLOCK = [name for name in WEIGHTS if name.startswith("layers")]


def _graph(*, head: str) -> ir.Model:
    """Embedding, two layers that share an input, one with a bias, and a head: tied, or none."""
    nodes = [
        helper.make_node("Gather", ["embed.weight", "input_ids"], ["x"]),
        *_linear("layers.0.up.weight", "x", "up"),
        *_linear("layers.0.gate.weight", "x", "gate"),
        helper.make_node("Mul", ["up", "gate"], ["inner"]),
        *_linear("layers.0.down.weight", "inner", "product"),
        helper.make_node("Add", ["product", "bias"], ["hidden" if head == "tied" else "logits"]),
    ]
    if head == "tied":
        nodes += _linear("embed.weight", "hidden", "logits")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", None])],
        [numpy_helper.from_array(array, name) for name, array in {**WEIGHTS, "bias": BIAS}.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(proto)


def _linear(weight: str, x: str, out: str) -> list[onnx.NodeProto]:
    transposed = f"{out}_transposed"
    return [
        helper.make_node("Transpose", [weight], [transposed], perm=[1, 0]),
        helper.make_node("MatMul", [x, transposed], [out]),
    ]


def _output(model: ir.Model, directory: Path) -> np.ndarray:
    save_graph(model, directory)
    return run(open_session(directory, threads=1), {"input_ids": IDS})


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_rows_are_rounded_to_the_nearest_of_255_levels() -> None:
    weight = WEIGHTS["layers.0.up.weight"].copy()
    weight[3] = 0
    codes, scale = int8_rows(weight)
    assert np.abs(codes.astype(int)).max(axis=1).tolist() == [0 if row == 3 else 127 for row in range(WIDE)]
    assert (np.abs(codes * scale - weight) <= scale / 2 * 1.0001).all()
    assert np.array_equal(codes[3], np.zeros(HIDDEN))


def test_blocks_have_scales_of_their_own_and_the_last_is_filled_with_zeros() -> None:
    weight = WEIGHTS["layers.0.up.weight"]
    codes, scale = int8_blocks(weight)
    assert codes.shape == (WIDE, 2, BLOCK)
    assert scale.shape == (WIDE, 2)
    assert (codes[:, 1, HIDDEN - BLOCK :] == 128).all()
    restored = ((codes.astype(np.float32) - 128) * scale[:, :, None]).reshape(WIDE, -1)[:, :HIDDEN]
    assert (np.abs(restored - weight) <= np.repeat(scale, BLOCK, axis=1)[:, :HIDDEN] / 2 * 1.0001).all()
    np.testing.assert_allclose(scale[:, 0], np.abs(weight[:, :BLOCK]).max(axis=1) / 127, rtol=1e-6)


@pytest.mark.parametrize(("layout", "tolerance"), [("tensor", 0.05), ("blocks", 0.02)])
def test_graph_computes_nearly_the_same_in_int8(layout: Layout, tolerance: float, tmp_path: Path) -> None:
    before = _output(_graph(head="none"), tmp_path / "float")
    model = _graph(head="none")
    found = quantize_graph(model, {name: WEIGHTS[name] for name in IN_BLOCK}, layout)
    after = _output(model, tmp_path / "int8")
    assert set(found) == set(IN_BLOCK)
    assert 0 < np.linalg.norm(after - before) / np.linalg.norm(before) < tolerance


def test_tensor_layout_gives_what_onnxruntimes_own_quantizer_gives(tmp_path: Path) -> None:
    model = _graph(head="none")
    quantize_graph(model, {name: WEIGHTS[name] for name in IN_BLOCK}, "tensor")
    ours = _output(model, tmp_path / "ours")
    # Its embedding stays in float: give it the rows as ours has them.
    codes, scale = int8_rows(WEIGHTS["embed.weight"])
    theirs = _graph(head="none")
    theirs.graph.initializers["embed.weight"].const_value = ir.tensor(codes * scale, name="embed.weight")
    for name in IN_BLOCK:
        theirs.graph.initializers[name].const_value = ir.tensor(WEIGHTS[name], name=name)
    save_graph(_folded(theirs), tmp_path / "float")
    (tmp_path / "theirs").mkdir()
    quantize_dynamic(
        tmp_path / "float" / MODEL_FILE,
        tmp_path / "theirs" / MODEL_FILE,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    np.testing.assert_allclose(
        ours, run(open_session(tmp_path / "theirs", threads=1), {"input_ids": IDS}), rtol=1e-3, atol=0.05
    )


def _folded(model: ir.Model) -> ir.Model:
    """The graph with its weights transposed beforehand: onnxruntime's quantizer sees no weight behind a Transpose."""
    from onnxscript.optimizer import fold_constants

    fold_constants(model, should_fold=lambda node: node.op_type == "Transpose" or None)
    return model


def test_layers_that_share_an_input_share_its_quantization() -> None:
    model = _graph(head="none")
    quantize_graph(model, {name: WEIGHTS[name] for name in IN_BLOCK}, "tensor")
    operators = _operators(model)
    assert operators["DynamicQuantizeLinear"] == 2
    assert operators["MatMulInteger"] == 3
    assert operators["MatMul"] == operators["Transpose"] == 0


def test_embedding_becomes_int8_rows_unless_a_float_head_reads_the_same_table() -> None:
    stored = {}
    for head in ("none", "tied"):
        model = _graph(head=head)
        quantize_graph(model, {name: WEIGHTS[name] for name in IN_BLOCK}, "tensor")
        stored[head] = {name: value.const_value.dtype for name, value in model.graph.initializers.items()}
    assert stored["none"]["embed.weight_rows_quantized"] == ir.DataType.INT8
    assert "embed.weight" not in stored["none"]
    assert stored["tied"]["embed.weight"] == ir.DataType.FLOAT
    assert "embed.weight_rows_quantized" not in stored["tied"]


def test_a_tied_head_reads_the_table_in_place_and_computes_the_same(tmp_path: Path) -> None:
    before = _output(_graph(head="tied"), tmp_path / "before")
    model = _graph(head="tied")
    embedding = token_embedding(model.graph)
    assert embedding is not None
    multiply_in_place(model.graph, embedding)
    assert _operators(model)["Gemm"] == 1
    assert linear_nodes(model.graph)["embed.weight"].node.op_type == "Gemm"
    np.testing.assert_allclose(_output(model, tmp_path / "after"), before, rtol=1e-4, atol=1e-3)


def test_a_tied_head_can_be_quantized_too(tmp_path: Path) -> None:
    before = _output(_graph(head="tied"), tmp_path / "before")
    model = _graph(head="tied")
    embedding = token_embedding(model.graph)
    assert embedding is not None
    multiply_in_place(model.graph, embedding)
    found = quantize_graph(model, WEIGHTS, "blocks")
    assert "embed.weight" in found
    assert "embed.weight" not in model.graph.initializers
    after = _output(model, tmp_path / "after")
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 0.03


def test_reported_error_and_bits_are_those_of_the_stored_weights() -> None:
    model = _graph(head="none")
    found = quantize_graph(model, {name: WEIGHTS[name] for name in IN_BLOCK}, "tensor")
    name = "layers.0.down.weight"
    initializers = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    restored = initializers[f"{name}_quantized"].T * initializers[f"{name}_scale"][:, None]
    error = np.linalg.norm(restored - WEIGHTS[name]) / np.linalg.norm(WEIGHTS[name])
    parts = [initializers[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point")]
    assert found[name].relative_error == pytest.approx(error, rel=1e-5)
    assert found[name].bits == pytest.approx(sum(part.nbytes for part in parts) * 8 / WEIGHTS[name].size)
