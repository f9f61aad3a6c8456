"""A network read from ONNX computes what onnxruntime computes, and so does the file it is written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import CLASSES, IMAGE, Grouped, Plain, Residual, write_tiny
from torch import nn

from app.errors import UnsupportedForModel
from app.spec.onnx_operators import ONNX_OPERATORS
from workers.engine.onnx_network import read_network, write_network
from workers.engine.onnx_network.operators import OPERATORS
from workers.engine.onnx_network.reading import check_same

_RANDOM = np.random.default_rng(0)


def _numbers(*shape: int) -> np.ndarray:
    return _RANDOM.standard_normal(shape).astype(np.float32)


def _write(path: Path, nodes: list[Any], arrays: dict[str, np.ndarray], *, opset: int = 18) -> Path:
    """A graph from `x`, images of 3 × 9 × 9, to `y`."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, str(path))
    return path


def _runtime(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.mark.parametrize("network", [Plain, Residual, Grouped])
def test_outputs_are_those_of_onnxruntime_before_and_after(network: type[nn.Module], tmp_path: Path) -> None:
    path = write_tiny(network, tmp_path / "model.onnx")
    images = _numbers(3, *IMAGE)
    expected = _runtime(path, images)
    read = read_network(path)
    np.testing.assert_allclose(read(torch.from_numpy(images)).detach().numpy(), expected, atol=2e-5)
    write_network(read, tmp_path / "again.onnx")
    again = _runtime(tmp_path / "again.onnx", images)
    assert again.shape == (3, CLASSES)
    np.testing.assert_allclose(again, expected, atol=2e-5)


_W = {"w": _numbers(4, 3, 3, 3)}
_OPERATORS: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]] = {
    "strided and dilated": ("Conv", {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 2, 1, 2]}, _W),
    "unevenly padded": ("Conv", {"pads": [0, 1, 2, 0]}, _W),
    "same upper": ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, _W),
    "same lower": ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, _W),
    "with bias": ("Conv", {}, {**_W, "b": _numbers(4)}),
    "largest": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}, {}),
    "largest, rounded up": ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, {}),
    "largest, defaults written out": (
        "MaxPool",
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 0, "dilations": [1, 1]},
        {},
    ),
    "largest, rounded up and padded": (
        "MaxPool",
        {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [0, 1, 1, 0], "ceil_mode": 1},
        {},
    ),
    "mean, defaults written out": (
        "AveragePool",
        {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 0, "dilations": [1, 1], "count_include_pad": 0},
        {},
    ),
    "mean, rounded up": ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, {}),
    "mean, rounded up and padded": (
        "AveragePool",
        {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 1},
        {},
    ),
    "mean, rounded up, with padding": (
        "AveragePool",
        {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 1, "count_include_pad": 1},
        {},
    ),
    "mean of the inside": ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1]}, {}),
    "mean with padding": ("AveragePool", {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}, {}),
    "mean": ("ReduceMean", {"keepdims": 0}, {"axes": np.array([2, 3])}),
    "mean of all": ("GlobalAveragePool", {}, {}),
    "limited": ("Clip", {}, {"low": np.float32(-0.2), "high": np.float32(0.7)}),
    "padded": ("Pad", {}, {"pads": np.array([0, 0, 1, 2, 0, 0, 0, 3]), "value": np.float32(2)}),
    "reflected": ("Pad", {"mode": "reflect"}, {"pads": np.array([0, 0, 1, 2, 0, 0, 0, 3])}),
    "gated": ("HardSwish", {}, {}),
    "hard": ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, {}),
    "leaky": ("LeakyRelu", {"alpha": 0.3}, {}),
    "shares": ("Softmax", {"axis": 1}, {}),
    "normed": ("BatchNormalization", {"epsilon": 0.01}, {n: np.abs(_numbers(3)) for n in ("s", "b", "m", "v")}),
    "product": ("MatMul", {}, {"w": _numbers(9, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("case", _OPERATORS)
def test_operators_are_those_of_onnxruntime(case: str, tmp_path: Path) -> None:
    operator, attributes, arrays = _OPERATORS[case]
    node = helper.make_node(operator, ["x", *arrays], ["y"], **attributes)
    opset = 19 if operator == "AveragePool" and "dilations" in attributes else 18
    path = _write(tmp_path / "one.onnx", [node], arrays, opset=opset)
    images = _numbers(2, 3, 9, 9)
    found = read_network(path)(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(found, _runtime(path, images), atol=1e-5)


def test_a_scaled_product_of_rows_is_that_of_onnxruntime(tmp_path: Path) -> None:
    arrays = {"w": _numbers(243, 4), "b": _numbers(4)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["rows"]),
        helper.make_node("Gemm", ["rows", *arrays], ["y"], alpha=0.5, beta=2.0),
    ]
    check_same(read_network(_write(tmp_path / "one.onnx", nodes, arrays)), tmp_path / "one.onnx", threads=1)


def test_rows_made_by_counting_channels_become_a_flattening(tmp_path: Path) -> None:
    """As old exporters write `x.view(x.size(0), -1)`."""
    arrays = {"first": np.array(0), "axes": np.array([0]), "rest": np.array([-1]), "w": _numbers(243, 4)}
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["batches"]),
        helper.make_node("Concat", ["batches", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    network = read_network(_write(tmp_path / "one.onnx", nodes, arrays))
    assert [call.operator for call in network.calls] == ["Flatten", "MatMul"]
    assert network.array_names == ("w",)


def test_an_unknown_operator_is_refused_by_its_name(tmp_path: Path) -> None:
    path = _write(tmp_path / "one.onnx", [helper.make_node("Celu", ["x"], ["y"])], {})
    with pytest.raises(UnsupportedForModel, match="it uses Celu"):
        read_network(path)


def test_an_unknown_attribute_is_refused_by_its_name(tmp_path: Path) -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], p=2)
    with pytest.raises(UnsupportedForModel, match="p = 2"):
        read_network(_write(tmp_path / "one.onnx", [node], {}))


def test_means_of_anything_but_neighbours_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])
    path = _write(tmp_path / "one.onnx", [node], {}, opset=19)
    with pytest.raises(UnsupportedForModel, match=r"AveragePool has dilations = \(2, 2\)"):
        read_network(path)


def test_a_graph_whose_shapes_do_not_fit_is_refused(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "one.onnx", [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": _numbers(4, 2, 3, 3)}
    )
    with pytest.raises(UnsupportedForModel, match="cannot be run through it"):
        read_network(path)


def test_weights_elsewhere_on_the_disk_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "one.onnx", [helper.make_node("Conv", ["x", "w"], ["y"])], _W)
    model = onnx.load(str(path))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../secrets")
    model.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedForModel, match="lie outside"):
        read_network(path)


def test_training_moves_the_statistics_of_batch_norms(tmp_path: Path) -> None:
    network = read_network(write_tiny(Plain, tmp_path / "model.onnx"))
    norm = next(call for call in network.calls if call.operator == "BatchNormalization")
    before = network.array(norm.inputs[3]).clone()
    network.train()(torch.from_numpy(_numbers(4, *IMAGE))).sum().backward()
    assert not torch.equal(network.array(norm.inputs[3]), before)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_intake_lets_in_what_the_interpreter_knows() -> None:
    assert ONNX_OPERATORS - {"Constant"} == set(OPERATORS)
