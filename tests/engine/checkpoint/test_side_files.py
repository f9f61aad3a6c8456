"""What belongs to a model beside its weights travels with it."""

from __future__ import annotations

import json
from pathlib import Path

from workers.engine.checkpoint import copy_side_files, write_config


def put(directory: Path, *names: str) -> None:
    for name in names:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)


def files_below(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def test_all_but_weights_and_their_index_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = ("config.json", "tokenizer.json", "generation_config.json", "vocab.txt", "1_Pooling/config.json")
    put(
        source, *kept, "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"
    )
    put(source, "pytorch_model.bin", "onnx/model.onnx", "README.md", ".cache/huggingface/x")
    copy_side_files(source, target)
    assert files_below(target) == {*kept, "README.md"}
    assert (target / "1_Pooling/config.json").read_text() == "1_Pooling/config.json"


def test_weights_of_a_sentence_transformers_module_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    put(source, "model.safetensors", "2_Dense/model.safetensors", "openvino/model.bin")
    (source / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 2, "path": "2_Dense"}]))
    copy_side_files(source, target)
    assert files_below(target) == {"modules.json", "2_Dense/model.safetensors"}


def test_the_config_written_is_the_one_read(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "llama", "name": "é"})
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama", "name": "é"}
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o644
