"""Facts of networks that come as ONNX, and graphs that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import IntakeError
from app.intake import onnx_header
from app.intake.onnx_header import read_onnx
from app.intake.read_model import read_model
from app.spec.base import Family
from app.spec.facts import ModelFacts

PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "size": 8,
    "image_mean": [0.1, 0.2, 0.3],
}


def graph(*, operator: str = "Relu", domain: str = "", batch: Any = "batch", dtype: Any = np.float32) -> Any:
    """A convolution, an activation, a mean and a classifier of five classes, for images of 8 × 8."""
    weights = {"w": np.ones((4, 3, 3, 3), dtype), "head": np.ones((5, 4), dtype)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node(operator, ["a"], ["b"], domain=domain),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "head"], ["y"], transB=1),
    ]
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, opset_imports=opsets)


def read(directory: Path, model: Any, processor: dict[str, Any] | None = PROCESSOR, **more: str) -> Any:
    directory.mkdir(exist_ok=True)
    (directory / "network.onnx").write_bytes(model.SerializeToString())
    if processor is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    for name, text in more.items():
        (directory / f"{name}.json").write_text(text)
    return read_model({path.name: path for path in directory.iterdir()})


def test_facts_are_those_of_the_graph(tmp_path: Path) -> None:
    found = read(tmp_path, graph(), config="{}")
    facts: ModelFacts = found.facts
    assert (facts.format, facts.family) == ("onnx", Family.IMAGE_CLASSIFIER)
    assert (facts.parameters, facts.num_labels, facts.hidden_size) == (4 * 27 + 20, 5, 4)
    assert facts.preprocessing is not None
    assert (facts.preprocessing.size, facts.preprocessing.mean) == ((8, 8), (0.1, 0.2, 0.3))
    assert {t.name for t in facts.compressible()} == {"w", "head"}
    assert set(found.files) == {"model.onnx", "preprocessor_config.json"}
    assert found.left_out[0].path == "config.json"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"operator": "Celu"}, "onnx_unsupported", "uses Celu"),
        ({"operator": "Relu", "domain": "evil"}, "onnx_unsupported", "uses evil.Relu"),
        ({"batch": 1}, "onnx_unsupported", "fixed number of images"),
        ({"dtype": np.float16}, "unsupported_dtype", "F16"),
        ({"dtype": np.int8}, "quantized_model", "stored as I8"),
    ],
)
def test_graphs_that_cannot_be_worked_on_are_refused(
    changes: dict[str, Any], code: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(IntakeError, match=words) as refused:
        read(tmp_path, graph(**changes))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("processor", "code"),
    [
        (None, "preprocessor_missing"),
        (PROCESSOR | {"size": 9}, "config_mismatch"),
        ({"size": 8}, "preprocessing_unknown"),
        (PROCESSOR | {"image_mean": [0.1]}, "preprocessing_unknown"),
    ],
)
def test_what_becomes_of_pixels_must_be_said(
    processor: dict[str, Any] | None, code: str, tmp_path: Path
) -> None:
    with pytest.raises(IntakeError) as refused:
        read(tmp_path, graph(), processor)
    assert refused.value.code == code


def test_weights_shorter_than_their_shape_are_refused(tmp_path: Path) -> None:
    model = graph()
    model.graph.initializer[0].dims[0] = 400
    with pytest.raises(IntakeError, match="its shape asks for"):
        read(tmp_path, model)


def hidden_constant() -> Any:
    """A constant of a node, not among the weights, says that its numbers are in a file outside."""
    model = graph()
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "c")
    onnx.external_data_helper.set_external_data(tensor, "/etc/passwd")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    return model


def hidden_graph() -> Any:
    """A graph, and in it whatever, as an attribute of an activation."""
    model = graph()
    inner = helper.make_graph([helper.make_node("Evil", [], ["e"], domain="evil")], "inner", [], [])
    model.graph.node[1].attribute.append(helper.make_attribute("then_branch", inner))
    return model


def many_channels() -> Any:
    model = graph()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**40
    return model


@pytest.mark.parametrize(
    ("model", "code"),
    [(hidden_constant, "header_invalid"), (hidden_graph, "onnx_unsupported"), (many_channels, "onnx_unsupported")],
)  # fmt: skip
def test_what_hides_in_a_graph_is_found(model: Any, code: str, tmp_path: Path) -> None:
    with pytest.raises(IntakeError) as refused:
        read(tmp_path, model(), PROCESSOR | {"do_normalize": False})
    assert refused.value.code == code


@pytest.mark.parametrize("location", ["/etc/passwd", "../../secret", "beside.bin"])
def test_no_weights_are_taken_from_other_files(location: str, tmp_path: Path) -> None:
    tmp_path.joinpath("model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(1000))
    (tmp_path / "model" / "beside.bin").symlink_to(tmp_path / "secret")
    model = graph()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location)
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(IntakeError, match="save the graph in one file"):
        read(tmp_path / "model", model)


def test_a_file_of_millions_of_fields_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_header, "_MAX_FIELDS", 1000)
    (tmp_path / "model.onnx").write_bytes(b"\x12\x00" * 1001)
    with pytest.raises(IntakeError, match="more than 1000 fields"):
        read_onnx(tmp_path / "model.onnx", "model.onnx")


def test_a_shape_of_many_sizes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        size = len(content)
        return bytes([number << 3 | 2, size & 127 | 128, size >> 7]) + content

    tensor = field(1, b"\1" * 10_000) + b"\x10\1" + field(8, b"w")
    (tmp_path / "model.onnx").write_bytes(field(7, field(5, tensor)) + field(8, b"\x10\x11"))
    with pytest.raises(IntakeError, match="more dimensions"):
        read_onnx(tmp_path / "model.onnx", "model.onnx")
