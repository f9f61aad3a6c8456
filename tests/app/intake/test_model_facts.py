"""Facts from headers: names as they will be, tied heads, labels, and what a selection leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_files import gguf, gguf_names, llama_files, llama_shapes, safetensors, safetensors_header

from app.errors import IntakeError
from app.intake.names import select
from app.intake.read_model import read_model
from app.spec.facts import ModelFacts


def read(directory: Path, files: dict[str, bytes]) -> ModelFacts:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return read_model({path.name: path for path in directory.iterdir()}).facts


def test_gguf_tensors_appear_under_their_hugging_face_names(tmp_path: Path) -> None:
    facts = read(tmp_path, {"m.gguf": gguf()})
    expected = set(llama_shapes())
    assert {t.name for t in facts.tensors} == expected
    assert {t.dtype for t in facts.tensors if len(t.shape) == 2} == {"BF16"}
    assert {t.dtype for t in facts.tensors if len(t.shape) == 1} == {"F32"}
    assert next(t for t in facts.tensors if t.name.endswith("0.mlp.down_proj.weight")).shape == (32, 64)
    assert facts.tied_embeddings


def test_gemma2_norms_go_where_gemma2_has_them(tmp_path: Path) -> None:
    facts = read(tmp_path, {"m.gguf": gguf("gemma2")})
    norms = {
        t.name.split(".")[3]
        for t in facts.tensors
        if t.name.startswith("model.layers.0.") and len(t.shape) == 1
    }
    assert norms == {
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    }  # fmt: skip


def test_an_output_matrix_unties_the_head(tmp_path: Path) -> None:
    tensors = [*gguf_names().items(), ("output.weight", (32, 32))]
    assert not read(tmp_path, {"m.gguf": gguf(tensors=tensors)}).tied_embeddings


def test_rope_frequencies_are_not_among_the_tensors(tmp_path: Path) -> None:
    tensors = [*gguf_names().items(), ("rope_freqs.weight", (16,))]
    assert len(read(tmp_path, {"m.gguf": gguf(tensors=tensors)}).tensors) == len(gguf_names())


def read_classifier(directory: Path, outputs: int, **said: str | None) -> ModelFacts:
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (32, 16),
        "bert.encoder.layer.0.attention.self.query.weight": (16, 16),
        "bert.encoder.layer.0.attention.output.LayerNorm.weight": (16,),
        "classifier.weight": (outputs, 16),
    }
    config = {
        "architectures": ["BertForSequenceClassification"], "hidden_size": 16, "num_hidden_layers": 1,
        "vocab_size": 32, "max_position_embeddings": 8,
    } | said  # fmt: skip
    weights = safetensors(safetensors_header(shapes, "F16", 2))
    return read(directory, {"config.json": json.dumps(config).encode(), "model.safetensors": weights})


def test_the_number_of_labels_is_that_of_the_head(tmp_path: Path) -> None:
    facts = read_classifier(tmp_path, 5)
    assert (facts.num_labels, facts.family, facts.dtype, facts.tied_embeddings) == (
        5,
        "encoder",
        "F16",
        False,
    )


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, None),
        ({"problem_type": None}, None),
        ({"problem_type": "single_label_classification"}, None),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "regression"),
    ],
)
def test_what_the_outputs_of_a_classifier_are_is_read(
    tmp_path: Path, said: dict[str, str | None], found: str | None
) -> None:
    assert read_classifier(tmp_path, 5, **said).problem_type == found


def test_an_unknown_kind_of_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match="a problem_type of 'sorting'"):
        read_classifier(tmp_path, 5, problem_type="sorting")


def test_a_classifier_that_scores_has_no_classes_to_compare(tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match="one output"):
        read_classifier(tmp_path, 1)


def test_a_side_file_of_300_megabytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(300 * 10**6)
    files = {n: c for n, c in llama_files().items() if n != "tokenizer.json"}
    with pytest.raises(IntakeError) as refused:
        read(tmp_path, files)
    assert refused.value.code == "file_too_large"


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (
            ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"],
            ["model.safetensors"],
        ),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "m.gguf"], ["model.safetensors"]),
        (["2_Dense/model.safetensors", "only.safetensors"], ["only.safetensors"]),
        (["sub/m.gguf", "README.md"], ["sub/m.gguf"]),
    ],
)
def test_one_set_of_weights_is_chosen_as_transformers_would(names: list[str], weights: list[str]) -> None:
    selection = select([*names, "config.json"])
    assert list(selection.weights) == weights
    left_out = {entry.path for entry in selection.left_out}
    assert left_out | set(selection.kept) == {*names, "config.json"}
    assert not left_out & set(selection.kept)
