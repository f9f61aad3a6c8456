"""Turn a GGUF file into a Hugging Face directory, tensor by tensor, with memory independent of the model's size.

Names, configuration keys and tokenizers follow transformers' own tables for GGUF, dequantization the `gguf`
package; what is ours is that no model is ever built: rows are read by pread, dequantized, and written where they
belong. Where transformers would drop something in silence (a tensor it does not know, a scaling of the rotary
embedding), the file is translated or refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, ReaderTensor, get_tensor_name_map
from torch import Tensor

from app.spec.facts import TensorFact
from workers.engine.checkpoint.gguf_file import GgufFile, dequantized, read_gguf, refused
from workers.engine.checkpoint.layout import DTYPE_NAMES
from workers.engine.checkpoint.side_files import write_config
from workers.engine.checkpoint.writer import CheckpointWriter
from workers.engine.technique import Progress

_SLAB_ELEMENTS = 8 * 2**20
# Scaled rotary frequencies of Llama 3.1 and later, which transformers computes from the configuration.
_ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(gguf_file: Path, target: Path, *, max_shard_bytes: int, progress: Progress) -> None:
    """Write config, generation config, tokenizer and safetensors of a GGUF language model into `target`.

    Weights become bfloat16, or float16/float32 where the file's own matrices are stored so; norms take the same
    dtype. Raises IntakeError for an architecture, a tensor or a rotary scaling that has no equivalent.
    """
    target.mkdir(parents=True, exist_ok=True)
    progress(0.0, "reading the GGUF header")
    source = read_gguf(gguf_file)
    config = configuration_of(source)
    names, shapes, architecture = _skeleton(source, config)
    dtype = _stored_dtype(source.tensors)
    _write_side_files(source, config, target, architecture=architecture, dtype=dtype)
    facts = [TensorFact(name=n, dtype=DTYPE_NAMES[dtype], shape=shapes[n]) for n in names.values()]
    total = sum(tensor.n_elements for tensor in source.tensors)
    done = 0
    with CheckpointWriter(target, facts, max_shard_bytes) as writer:
        for tensor in source.tensors:
            if tensor.name == _ROPE_FACTORS:
                continue
            for start, rows in _rows(source, tensor, config, shapes[names[tensor.name]]):
                writer.write_rows(names[tensor.name], start, rows.to(dtype))
                progress((done + start * rows[0].numel()) / total, f"converting {tensor.name}")
            done += tensor.n_elements
    progress(1.0, "converted")


def configuration_of(source: GgufFile) -> dict[str, Any]:
    """The configuration as transformers spells it, by its own table of GGUF keys."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    config: dict[str, Any] = {}
    # llama.cpp writes Mistral as llama too; without a window of attention the two compute the same.
    for section in (source.architecture, "tokenizer"):
        for key, name in GGUF_CONFIG_MAPPING[section].items():
            value = source.metadata.get(f"{section}.{key}")
            if name is not None and value is not None:
                config[name] = value
    config["model_type"] = {"gemma3": "gemma3_text"}.get(source.architecture, source.architecture)
    config.setdefault("vocab_size", len(source.metadata.get("tokenizer.ggml.tokens", ())))
    config["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in source.tensors)
    if (
        source.architecture in {"qwen3", "llama"}
        and (width := source.get("attention.key_length")) is not None
    ):
        config["head_dim"] = width
    if source.architecture in {"gemma2", "gemma3"}:
        config["query_pre_attn_scalar"] = _gemma_scale(source)
    if (scaling := _rope_scaling(source)) is not None:
        config["rope_scaling"] = scaling
    return config


def _gemma_scale(source: GgufFile) -> int:
    """The square of the divisor of attention scores, which GGUF leaves out; as llama.cpp's gemma2 and gemma3 have it."""
    is_27b = source.get("block_count") == {"gemma2": 46, "gemma3": 62}[source.architecture]
    if is_27b:
        return int(source.get("embedding_length")) // int(source.get("attention.head_count"))
    return int(source.get("attention.key_length"))


def _rope_scaling(source: GgufFile) -> dict[str, Any] | None:
    """How the rotary embedding is scaled, in transformers' words; None if it is not. Raises IntakeError."""
    factors = next((tensor for tensor in source.tensors if tensor.name == _ROPE_FACTORS), None)
    if factors is not None:
        return _llama3_scaling(source, factors)
    kind = source.get("rope.scaling.type")
    if kind in {None, "none"}:
        return None
    if source.architecture not in {"llama", "qwen2", "qwen3"} or kind not in {"linear", "yarn"}:
        raise refused(f"rotary embeddings scaled by {kind}")
    scaling = {"rope_type": kind, "factor": float(source.get("rope.scaling.factor") or 1.0)}
    if kind == "yarn" and (context := source.get("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = context
    return scaling


def _llama3_scaling(source: GgufFile, factors: ReaderTensor) -> dict[str, Any]:
    """Recover Llama 3.1's scaling from the factors it gives; all its releases share every number but `factor`."""
    stored = dequantized(source, factors, 0, 1).flatten().numpy()
    low, high, context = 1.0, 4.0, 8192
    factor = float(stored.max())
    theta = float(source.get("rope.freq_base") or 10_000.0)
    wavelength = 2 * math.pi * theta ** (np.arange(stored.size) / stored.size)
    # From 0, all of the factor, to 1, none of it.
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise refused("rotary frequency factors of its own")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _skeleton(
    source: GgufFile, config: dict[str, Any]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], str]:
    """Names (GGUF to Hugging Face), shapes by Hugging Face name, and class of a model that is never filled."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    names = _gguf_names(source, shapes, blocks=config["num_hidden_layers"])
    stored = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in source.tensors}
    stored.pop(_ROPE_FACTORS, None)
    if unknown := sorted(stored.keys() - names.keys()):
        raise refused(f"tensors such as {unknown[0]}")
    if missing := sorted(names.keys() - stored.keys()):
        raise refused(f"no tensor {missing[0]}")
    for name, shape in stored.items():
        if math.prod(shape) != math.prod(shapes[names[name]]):
            raise refused(f"{name} of shape {shape}, where its metadata says {shapes[names[name]]}")
    return {name: names[name] for name in stored}, shapes, type(model).__name__


def _gguf_names(source: GgufFile, shapes: Iterable[str], *, blocks: int) -> dict[str, str]:
    """Hugging Face names by GGUF name, from the `gguf` package's table of the architecture."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == source.architecture)
    table = get_tensor_name_map(kind, blocks)
    names: dict[str, str] = {}
    for name in shapes:
        gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"the gguf package has no name for {name}")
        names[gguf_name] = name
    return names


def _stored_dtype(tensors: tuple[ReaderTensor, ...]) -> torch.dtype:
    """The dtype of the matrices if they all share a floating-point one, else bfloat16. Norms are always float32."""
    kinds = {tensor.tensor_type for tensor in tensors if len(tensor.shape) > 1}
    if kinds <= {GGMLQuantizationType.F32}:
        return torch.float32
    if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}:
        return torch.float16
    return torch.bfloat16


def _rows(
    source: GgufFile, tensor: ReaderTensor, config: dict[str, Any], shape: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Slabs of a tensor as (first row, values in fp32), with what llama.cpp did to it undone."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor = TENSOR_PROCESSORS.get(source.architecture, TensorProcessor)(config=config)
    rows = shape[0]
    # The permuted rows of q and k may come from anywhere in a head: these two are taken whole.
    whole = len(shape) == 1 or ".attn_q." in tensor.name or ".attn_k." in tensor.name
    step = rows if whole else max(1, _SLAB_ELEMENTS // (tensor.n_elements // rows))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        values = dequantized(source, tensor, start / rows, stop / rows).view(stop - start, *shape[1:])
        processed = processor.process(weights=values.numpy(), name=tensor.name).weights
        yield start, torch.from_numpy(np.ascontiguousarray(processed))


def _write_side_files(
    source: GgufFile, config: dict[str, Any], target: Path, *, architecture: str, dtype: torch.dtype
) -> None:
    import transformers

    full = transformers.AutoConfig.for_model(**config)
    full.architectures = [architecture]
    full.dtype = dtype
    content = full.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        content.pop(key, None)
    content["architectures"] = [architecture]
    content["dtype"] = str(dtype).removeprefix("torch.")
    write_config(target, content)
    with _group_readable():
        transformers.GenerationConfig.from_model_config(full).save_pretrained(str(target))
        _tokenizer(source).save_pretrained(str(target))


def _tokenizer(source: GgufFile) -> Any:
    """The tokenizer in the file, built as transformers does but without parsing the header twice more."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    try:
        architecture, vocabulary, settings = get_gguf_tokenizer(str(source.file))
        backend, extra = convert_gguf_tokenizer(architecture, vocabulary)
    except (ValueError, KeyError) as error:
        raise refused(f"a tokenizer that transformers cannot build ({error})") from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(settings | extra))


@contextmanager
def _group_readable() -> Iterator[None]:
    """Other users (the API's) must be able to read what a library writes here."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)
