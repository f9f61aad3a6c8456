"""Carry over what belongs to a model beside its weights: config, tokenizer, sentence-transformers' modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_WEIGHT_SUFFIXES = frozenset(
    {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".ot",
        ".gguf",
        ".tflite",
    }
)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy every file that is neither weights nor their index, keeping its path; files are readable by all.

    A directory that modules.json names (sentence-transformers' pooling or dense layers) is copied whole: its weights
    are no part of the transformer and stay as they are. Hidden files stay behind.
    """
    modules = _module_directories(source)
    for file in sorted(source.rglob("*")):
        path = file.relative_to(source)
        if not file.is_file() or any(part.startswith(".") for part in path.parts):
            continue
        if _is_weights(path) and path.parts[0] not in modules:
            continue
        copy = target / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        copy.chmod(0o644)


def write_config(target: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    file = target / "config.json"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file.chmod(0o644)


def _is_weights(path: Path) -> bool:
    return path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")


def _module_directories(source: Path) -> frozenset[str]:
    file = source / "modules.json"
    if not file.is_file():
        return frozenset()
    modules = json.loads(file.read_text(encoding="utf-8"))
    return frozenset(Path(module["path"]).parts[0] for module in modules if module.get("path"))
