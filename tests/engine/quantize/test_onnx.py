"""quantize.onnx on tiny models: what onnxruntime computes from the written files, and what the outcome says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import facts_of, tiny_model

from app.spec.architectures import block_index
from app.spec.base import Family
from app.spec.compression import CompressionSpec
from app.spec.plan import plan_job
from app.spec.quantize_onnx import QuantizeOnnx
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.export import onnx as export
from workers.engine.measure.size_onnx import count_onnx
from workers.engine.technique import StepContext, StepOutcome, run_step

_TEXT = "She read the letter twice, folded it, and put it away without saying a word."
QDQ = {"method": "qdq"}
INT4 = {"bits": 4, "symmetric": False, "quantize_head": True}


@dataclass(frozen=True)
class Written:
    """A graph, the model it was made of, and what the technique said."""

    source: Path
    target: Path
    outcome: StepOutcome


Write = Callable[[Mapping[str, object]], Written]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of two blocks whose inputs are no multiple of the largest blocks, its head tied to its embedding."""
    return tiny_model(
        "LlamaForCausalLM", tmp_path_factory.mktemp("tied"), num_hidden_layers=2, intermediate_size=96,
        tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def write(tied: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Quantize the tied decoder, once for each settings."""
    done: dict[str, Written] = {}

    def of(settings: Mapping[str, object]) -> Written:
        key = str(settings)
        if key not in done:
            target = tmp_path_factory.mktemp("out")
            done[key] = Written(tied, target, run(tied, target, tiny_text, settings))
        return done[key]

    return of


def run(source: Path, target: Path, text: Path, settings: Mapping[str, object]) -> StepOutcome:
    step = QuantizeOnnx.model_validate({"calibration_tokens": 512, **settings})
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text, threads=2
    )  # fmt: skip
    return run_step(step, context)


def error(source: Path, target: Path) -> float:
    """Relative error of onnxruntime's outputs against PyTorch's original."""
    tokens = load_tokenizer(source)(_TEXT, return_tensors="pt")
    with torch.inference_mode():
        reference = load_model(source)(**tokens)[0].numpy()
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {node.name: tokens[node.name].numpy() for node in session.get_inputs()}
    return float(np.linalg.norm(session.run(None, feed)[0] - reference) / np.linalg.norm(reference))


def operators(target: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(target / "model.onnx").graph.node)


@pytest.mark.parametrize(("settings", "most"), [(INT4, 0.25), (QDQ, 0.05)], ids=["int4", "qdq"])
def test_outputs_stay_close_and_bytes_are_those_planned(
    settings: Mapping[str, object], most: float, write: Write
) -> None:
    written = write(settings)
    assert error(written.source, written.target) < most
    spec = CompressionSpec(steps=(QuantizeOnnx.model_validate(settings),))
    planned = plan_job(spec, facts_of(written.source)).output_bytes
    graph_bytes = 35_000 * 3
    stored = sum(size for _, size in count_onnx(written.target / "model.onnx")[2])
    assert planned - graph_bytes == pytest.approx(stored, rel=0.02)


def test_a_tied_head_in_8_bits_is_stored_once(write: Write) -> None:
    written = write(INT4)
    graph = onnx.load(written.target / "model.onnx").graph
    facts = facts_of(written.source)
    tables = [t for t in graph.initializer if t.dims[:1] == [facts.vocab_size] and np.prod(t.dims) >= 20_000]
    assert [onnx.TensorProto.DataType.Name(t.data_type) for t in tables] == ["UINT8"]
    assert operators(written.target)["GatherBlockQuantized"] == 1
    parameters, low_bit, _ = count_onnx(written.target / "model.onnx")
    assert parameters == pytest.approx(facts.parameters, rel=0.01)
    assert low_bit > 0.98 * parameters


def test_every_product_of_qdq_is_computed_in_integers(write: Write, tmp_path: Path) -> None:
    written = write(QDQ)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(written.target / "model.onnx", options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert fused["MatMulIntegerToFloat"] == 14


def test_ignored_layers_stay_in_float_say_why_and_large_weights_lie_beside_the_graph(
    tied: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 1000)
    outcome = run(tied, tmp_path, tiny_text, {"ignore": ["*.layers.1.*", "*nothing*"], "block_size": 128})
    untouched = [layer for layer in outcome.layers if layer.action == "untouched"]
    assert {block_index(layer.name) for layer in untouched} == {1}
    assert all("'*.layers.1.*'" in (layer.reason or "") for layer in untouched)
    assert any("*nothing*" in warning for warning in outcome.warnings)
    assert operators(tmp_path)["MatMulNBits"] == 7
    assert {"model.onnx", "model.onnx_data"} <= {file.name for file in tmp_path.iterdir()}
    assert error(tied, tmp_path) < 0.03


@pytest.mark.slow
def test_smoothing_helps_where_channels_differ(tmp_path: Path, tiny_text: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    # One input of down_proj is 100 times the others; the function stays the same.
    tensors["model.layers.0.mlp.up_proj.weight"][0] *= 100
    tensors["model.layers.0.mlp.down_proj.weight"][:, 0] /= 100
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    errors = []
    for smoothing in (0.0, 0.5):
        target = tmp_path / str(smoothing)
        target.mkdir()
        run(source, target, tiny_text, {"smoothing": smoothing, "ranges": "minmax", **QDQ})
        errors.append(error(source, target))
    assert errors[1] < 0.5 * errors[0]


def test_auto_is_static_int8_for_encoders_and_scales_per_block_for_language_models() -> None:
    auto = QuantizeOnnx(method="auto")
    assert auto.method_for(Family.ENCODER) == "qdq"
    assert auto.method_for(Family.CAUSAL_LM) == "matmul_nbits"
    assert QuantizeOnnx(method="auto", bits=4).method_for(Family.ENCODER) == "matmul_nbits"


@pytest.mark.parametrize("wrong", [{"bits": 4}, {"symmetric": False}, {"quantize_head": True}])
def test_qdq_refuses_settings_it_does_not_know(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="leave out bits, symmetric and quantize_head"):
        QuantizeOnnx.model_validate({"method": "qdq", **wrong})
