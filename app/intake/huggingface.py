"""Facts of a Hugging Face folder: config.json and the headers of its safetensors, single or sharded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.errors import IntakeError
from app.intake.config_values import config_integer, config_labels, config_problem
from app.intake.image_models import check_image_shapes, image_values
from app.intake.names import CONFIG, INDEX, PREPROCESSOR, Selection
from app.intake.refusals import refused
from app.intake.safetensors_header import MAX_TENSORS, read_header
from app.intake.shapes import check_shapes
from app.intake.strict_json import read_object
from app.spec.architectures import ARCHITECTURES, Architecture, block_index
from app.spec.attention_heads import GROUPS_KEY, HEADS_KEY
from app.spec.base import Family
from app.spec.facts import ModelFacts, TensorFact

_MAX_CONFIG_BYTES = 2**20
# Gemma's tokenizer_config.json lists every added token: more than 1 MB.
_MAX_JSON_BYTES = 16 * 2**20
_FLOATS = ("F64", "F32", "F16", "BF16")
_CODE_CONFIGS = (CONFIG, "tokenizer_config.json", "processor_config.json", PREPROCESSOR)
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classifier.1.weight")
_TIED_KEY = "tie_word_embeddings"
_EXPERTS_KEY = "num_experts_per_tok"


def huggingface_facts(files: Mapping[str, Path], selection: Selection) -> ModelFacts:
    """Facts of the model that `selection` picked from `files`. Raises IntakeError."""
    config, architecture = _config(files)
    tensors = _tensors(files, selection.weights)
    num_labels = _num_labels(architecture, tensors)
    facts = ModelFacts(
        format="safetensors",
        architecture=architecture.name,
        family=architecture.family,
        parameters=sum(t.elements for t in tensors),
        dtype=_main_dtype(tensors),
        weight_bytes=sum(files[name].stat().st_size for name in selection.weights),
        num_labels=num_labels,
        label_names=config_labels(config, num_labels),
        problem_type=None if num_labels is None else config_problem(config),
        tensors=tensors,
        **_values(files, config, architecture, tensors),
    )
    if architecture.takes_images:
        check_image_shapes(facts, config)
    else:
        key = architecture.embedding_key
        check_shapes(
            facts, CONFIG, embedding_size=config_integer(config, key) if key and key in config else None
        )
        _check_experts(facts)
    _check_dtypes(facts)
    return facts


def _values(
    files: Mapping[str, Path],
    config: dict[str, Any],
    architecture: Architecture,
    tensors: tuple[TensorFact, ...],
) -> dict[str, Any]:
    """What the config says of a model's sizes, by the names of the facts."""
    if architecture.takes_images:
        if PREPROCESSOR not in files:
            raise refused("preprocessor_missing", f"There is no {PREPROCESSOR} beside the weights.")
        return image_values(config, _json(files[PREPROCESSOR], PREPROCESSOR), architecture, tensors)
    return {
        "hidden_size": config_integer(config, architecture.hidden_key),
        "num_blocks": config_integer(config, architecture.blocks_key),
        "vocab_size": config_integer(config, "vocab_size"),
        "max_positions": config_integer(config, architecture.positions_key),
        "tied_embeddings": _is_tied(config, architecture, tensors),
        "experts_per_token": config_integer(config, _EXPERTS_KEY) if architecture.expert_layers else None,
        "attention_heads": config_integer(config, HEADS_KEY) if HEADS_KEY in config else None,
        "key_value_heads": config_integer(config, GROUPS_KEY) if config.get(GROUPS_KEY) is not None else None,
    }


def _config(files: Mapping[str, Path]) -> tuple[dict[str, Any], Architecture]:
    if CONFIG not in files:
        raise refused("config_missing", "There is no config.json beside the weights.")
    for name in _CODE_CONFIGS:
        if name in files and "auto_map" in _json(files[name], name):
            raise refused("remote_code", f"{name} has `auto_map`: the model wants code of its own to be run.")
    config = _json(files[CONFIG], CONFIG)
    if "quantization_config" in config or "compression_config" in config:
        raise refused("quantized_model", "config.json says that the weights are quantized already.")
    return config, _architecture(config)


def _architecture(config: dict[str, Any]) -> Architecture:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise refused("config_invalid", "config.json has no `architectures`, the name of the model's class.")
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        raise refused("unknown_architecture", f"Modelpress does not know {names[0][:100]!r}.")
    if config.get("model_type", architecture.model_type) != architecture.model_type:
        raise refused(
            "config_mismatch",
            f"config.json says {architecture.name}, whose model_type is {architecture.model_type}, and "
            f"{str(config['model_type'])[:50]!r}.",
        )
    return architecture


def _tensors(files: Mapping[str, Path], weights: tuple[str, ...]) -> tuple[TensorFact, ...]:
    placed: dict[str, str] = {}
    tensors: list[TensorFact] = []
    for name in weights:
        for tensor in read_header(files[name], name):
            if tensor.name in placed:
                raise refused("duplicate_tensor", f"{tensor.name} is in {placed[tensor.name]} and in {name}.")
            placed[tensor.name] = name
            tensors.append(tensor)
        if len(tensors) > MAX_TENSORS:
            raise refused("header_invalid", f"The model has more than {MAX_TENSORS} tensors.")
    if INDEX in files and len(weights) > 0 and weights[0] != "model.safetensors":
        _check_index(files[INDEX], placed, set(weights))
    return tuple(tensors)


def _check_index(path: Path, placed: dict[str, str], shards: set[str]) -> None:
    """The index must name exactly the tensors there are, each in the shard it is in."""
    index = read_object(path, max_bytes=_MAX_JSON_BYTES, refuse=_refuse(INDEX)).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise refused("header_invalid", f"{INDEX} has no usable weight_map.")
    absent = sorted(set(index.values()) - shards)
    if absent:
        raise refused(
            "shard_missing", f"{len(absent)} shards of the index are missing: {', '.join(absent[:5])[:200]}."
        )
    for name, shard in index.items():
        if placed.get(name) != shard:
            where = f"it is in {placed[name]}" if name in placed else "it is in no shard"
            raise refused(
                "tensor_missing", f"{INDEX} says that {name[:100]!r} is in {shard[:100]}, but {where}."
            )
    unnamed = sorted(set(placed) - set(index))
    if unnamed:
        raise refused(
            "header_invalid", f"{INDEX} does not name {unnamed[0]}, which is in {placed[unnamed[0]]}."
        )


def _is_tied(config: dict[str, Any], architecture: Architecture, tensors: tuple[TensorFact, ...]) -> bool:
    if architecture.family is not Family.CAUSAL_LM or any(t.name == architecture.head for t in tensors):
        return False
    if config.get(_TIED_KEY) is False:
        raise refused(
            "config_mismatch",
            f"config.json says that {_TIED_KEY} is false, but there is no {architecture.head}.",
        )
    return True


def _num_labels(architecture: Architecture, tensors: tuple[TensorFact, ...]) -> int | None:
    if not architecture.has_labels:
        return None
    head = next((t for t in tensors if t.name in _HEADS and len(t.shape) == 2), None)
    if head is None:
        raise refused("tensor_missing", f"{architecture.name} has no classification head among its tensors.")
    if head.shape[0] == 1:
        raise refused(
            "config_mismatch",
            "The classifier has one output: it scores texts, and what is compared here are classes.",
        )
    return head.shape[0]


def _check_experts(facts: ModelFacts) -> None:
    """All experts of a block in one tensor is how transformers computes, and no form that other readers know."""
    fused = next((t for t in facts.tensors if block_index(t.name) is not None and len(t.shape) == 3), None)
    if facts.experts_per_token is not None and fused is not None:
        raise refused(
            "tensor_missing", f"{fused.name} holds all experts of a block; each must have its own tensors."
        )


def _check_dtypes(facts: ModelFacts) -> None:
    layers = facts.compressible()
    if not layers:
        raise refused("tensor_missing", "There is no linear layer inside the model's blocks.")
    for tensor in layers:
        if tensor.dtype not in _FLOATS:
            raise refused(
                "quantized_model", f"{tensor.name} is stored as {tensor.dtype}: it is quantized already."
            )


def _main_dtype(tensors: tuple[TensorFact, ...]) -> str:
    totals: Counter[str] = Counter()
    for tensor in tensors:
        if block_index(tensor.name) is not None:
            totals[tensor.dtype] += math.prod(tensor.shape)
    return totals.most_common(1)[0][0] if totals else tensors[0].dtype


def _json(path: Path, name: str) -> dict[str, Any]:
    most = _MAX_CONFIG_BYTES if name == CONFIG else _MAX_JSON_BYTES
    return read_object(path, max_bytes=most, refuse=_refuse(name))


def _refuse(name: str) -> Any:
    def refuse(why: str) -> IntakeError:
        return refused("config_invalid", f"{name} cannot be used: {why}.")

    return refuse
