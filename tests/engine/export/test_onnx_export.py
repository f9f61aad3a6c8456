from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from tiny_models import tiny_model
from transformers import LlamaForCausalLM

from app.errors import JobFailed, VerificationFailed
from app.spec.architectures import ARCHITECTURES, block_index
from workers.engine.architectures.loading import architecture_of, load_model
from workers.engine.export import onnx as onnx_export
from workers.engine.export.onnx import (
    DATA_FILE,
    MODEL_FILE,
    check_graph,
    export_graph,
    input_names,
    open_session,
    publish_graph,
    rewrite_graph,
    run,
    save_graph,
)
from workers.engine.export.onnx_graph import linear_nodes, token_embedding


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ir.Model]:
    """A language model of two blocks whose head is its embedding, and its graph."""
    directory = tiny_model(
        "LlamaForCausalLM", tmp_path_factory.mktemp("tied"), num_hidden_layers=2, tie_word_embeddings=True
    )
    model = load_model(directory)
    return model, export_graph(model, "LlamaForCausalLM")


def _padded_batch(names: list[str]) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(3, 300, (3, 21))
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    return {name: known[name] for name in names}


def _torch_output(model: Any, feed: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in feed.items()})[0].numpy()


def _check_against_torch(model: Any, graph: ir.Model, directory: Path) -> None:
    save_graph(graph, directory)
    check_graph(directory, threads=1)
    feed = _padded_batch(input_names(model))
    expected, output = _torch_output(model, feed), run(open_session(directory, threads=1), feed)
    seen = feed["attention_mask"].astype(bool) if output.ndim == 3 else slice(None)
    np.testing.assert_allclose(output[seen], expected[seen], atol=1e-4 * np.abs(expected).max())


def test_graph_gives_the_outputs_of_pytorch_at_another_batch_and_length_with_padding(
    tied: tuple[Any, ir.Model], tmp_path: Path
) -> None:
    _check_against_torch(*tied, tmp_path / "graph")


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [a.name for a in ARCHITECTURES.values() if a.expert_layers is None and not a.takes_images]
)
def test_every_architecture_is_exported_with_each_linear_layer_under_its_own_name(
    architecture: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(tiny(architecture))
    graph = export_graph(model, architecture_of(tiny(architecture)))
    modules = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert {n for n in linear_nodes(graph.graph) if block_index(n) is not None} == {
        n for n in modules if block_index(n) is not None
    }
    assert token_embedding(graph.graph) is not None
    _check_against_torch(model, graph, tmp_path / "graph")


def test_inputs_and_outputs_have_the_names_and_free_sizes_that_users_expect(
    tied: tuple[Any, ir.Model],
) -> None:
    graph = tied[1].graph
    shapes = {value.name: [str(size) for size in value.shape] for value in (*graph.inputs, *graph.outputs)}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "logits": ["batch", "sequence", "320"],
    }


def test_a_table_shared_by_embedding_and_head_is_stored_once_even_after_onnxruntime_rewrote_the_graph(
    tied: tuple[Any, ir.Model], tmp_path: Path
) -> None:
    model, graph = tied
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    size = save_graph(graph, tmp_path / "graph")
    rewritten = rewrite_graph(tmp_path / "graph", tmp_path / "rewritten", "all", threads=1)
    assert weights < size < weights + 60_000
    assert weights < rewritten < weights + 60_000
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "rewritten" / MODEL_FILE).graph.node)
    assert operators["Gemm"] == 1


def test_published_graph_is_one_file_unless_protobuf_cannot_hold_it(
    tied: tuple[Any, ir.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for limit, files in ((onnx_export.SINGLE_FILE_BYTES, {MODEL_FILE}), (1000, {MODEL_FILE, DATA_FILE})):
        monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", limit)
        directory, target = tmp_path / f"graph-{limit}", tmp_path / f"target-{limit}"
        target.mkdir()
        save_graph(tied[1], directory)
        publish_graph(directory, target)
        assert {file.name for file in target.iterdir()} == files
        outputs.append(run(open_session(target, threads=1), _padded_batch(["input_ids", "attention_mask"])))
    assert np.array_equal(*outputs)


def test_segments_are_an_input_of_those_models_that_were_trained_with_them(
    tiny: Callable[[str], Path],
) -> None:
    names = {
        name: input_names(load_model(tiny(name))) for name in ("BertModel", "RobertaModel", "DistilBertModel")
    }
    assert names["BertModel"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert names["RobertaModel"] == names["DistilBertModel"] == ["input_ids", "attention_mask"]


class _Undecided(LlamaForCausalLM):
    """Chooses its way by the tokens themselves, which no graph can express."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        return (input_ids * 2,) if int(input_ids.sum()) % 2 else (input_ids.tolist(),)


def test_what_pytorch_cannot_export_fails_with_a_code_and_names_the_architecture(
    tied: tuple[Any, ir.Model],
) -> None:
    with pytest.raises(JobFailed) as caught:
        export_graph(_Undecided(tied[0].config).eval(), "LlamaForCausalLM")
    assert caught.value.code == "onnx_export_failed"
    assert "LlamaForCausalLM" in caught.value.detail
    assert caught.value.hint


def _write(directory: Path, batch: str | int, node: onnx.NodeProto, *constants: onnx.TensorProto) -> Path:
    directory.mkdir()
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [batch, "sequence"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", "columns"])]
    cast = helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT)
    graph = helper.make_graph([cast, node], "g", inputs, outputs, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, directory / MODEL_FILE)
    return directory


def test_check_refuses_a_graph_whose_output_is_not_finite(tmp_path: Path) -> None:
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    directory = _write(tmp_path / "g", "batch", helper.make_node("Div", ["x", "zero"], ["logits"]), zero)
    with pytest.raises(VerificationFailed, match="not finite"):
        check_graph(directory, threads=1)


def test_check_refuses_a_graph_that_mixes_up_its_sequences(tmp_path: Path) -> None:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, -1])
    directory = _write(
        tmp_path / "g", "batch", helper.make_node("Reshape", ["x", "shape"], ["logits"]), shape
    )
    with pytest.raises(VerificationFailed, match="2 sequences"):
        check_graph(directory, threads=1)


def test_check_refuses_a_graph_that_breaks_the_rules_of_onnx(tmp_path: Path) -> None:
    directory = _write(tmp_path / "g", "batch", helper.make_node("Relu", ["nowhere"], ["logits"]))
    with pytest.raises(VerificationFailed, match=r"onnx\.checker"):
        check_graph(directory, threads=1)


def test_check_refuses_a_graph_with_a_fixed_batch(tmp_path: Path) -> None:
    directory = _write(tmp_path / "g", 1, helper.make_node("Relu", ["x"], ["logits"]))
    with pytest.raises(VerificationFailed, match="onnxruntime"):
        check_graph(directory, threads=1)
