"""Facts of networks that come as ONNX, and graphs that are refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from app.errors import IntakeError
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


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    model = graph()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../../etc/passwd")
    with pytest.raises(IntakeError, match="in another file"):
        read(tmp_path, model)


def test_weights_shorter_than_their_shape_are_refused(tmp_path: Path) -> None:
    model = graph()
    model.graph.initializer[0].dims[0] = 400
    with pytest.raises(IntakeError, match="its shape asks for"):
        read(tmp_path, model)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path: Path, at: int, byte: int, cut: int
) -> None:
    content = bytearray(graph().SerializeToString())
    content[at % len(content)] = byte
    path = tmp_path / "damaged.onnx"
    path.write_bytes(bytes(content[: 1 + cut % len(content)]))
    with contextlib.suppress(IntakeError):
        read_onnx(path, "damaged.onnx")
