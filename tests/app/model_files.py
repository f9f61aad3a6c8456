"""Models as bytes, made without torch: what tests of intake feed in, whole or broken in one place."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

HIDDEN = 16
BLOCKS = 2
VOCABULARY = 32
INTERMEDIATE = 24

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}

Shapes = dict[str, tuple[int, ...]]


def llama_shapes(blocks: int = BLOCKS, hidden: int = HIDDEN, vocabulary: int = VOCABULARY) -> Shapes:
    """Names and shapes of a tied llama."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for block in range(blocks):
        at = f"model.layers.{block}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}self_attn.{name}.weight"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{at}mlp.{name}.weight"] = (INTERMEDIATE, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (hidden,)
    return shapes


def safetensors_header(shapes: Shapes, dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    """The header of a safetensors file with these tensors, one behind the other."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        count = size
        for dimension in shape:
            count *= dimension
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count]}
        at += count
    return header


def safetensors(header: Mapping[str, Any] | str | bytes, data: bytes | None = None) -> bytes:
    """A safetensors file; its data are of the length the header needs unless given."""
    if data is None:
        assert isinstance(header, Mapping)
        ends = [e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"]
        data = bytes(i * 37 % 251 for i in range(max(ends)))
    raw = json.dumps(header) if isinstance(header, Mapping) else header
    encoded = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(encoded)) + encoded + data


def llama_files(**config: Any) -> dict[str, bytes]:
    """A folder with a tiny llama; `config` overrides keys of config.json."""
    return {
        "config.json": json.dumps(CONFIG | config).encode(),
        "model.safetensors": safetensors(safetensors_header(llama_shapes())),
        "tokenizer.json": b"{}",
    }


def sharded_llama_files() -> dict[str, bytes]:
    """The same in two shards with an index."""
    shapes = list(llama_shapes().items())
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = (dict(shapes[:5]), dict(shapes[5:]))
    index = {"weight_map": {t: name for name, half in zip(names, halves, strict=True) for t in half}}
    shards = {n: safetensors(safetensors_header(half)) for n, half in zip(names, halves, strict=True)}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    } | shards


def zipped(files: Mapping[str, bytes], *, compress: bool = False) -> bytes:
    """A zip archive."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def tarred(
    files: Mapping[str, bytes], *, mode: str = "w", extra: tuple[tarfile.TarInfo, ...] = (), **options: Any
) -> bytes:
    """A tar archive; `extra` members have no content."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode, **options) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return target.getvalue()


def gguf_string(text: str) -> bytes:
    """A string as GGUF writes it."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(key: str, value: Any) -> bytes:
    """A key and its value: str, int (UINT32) or list of str."""
    head = gguf_string(key)
    if isinstance(value, str):
        return head + struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value, list):
        return head + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))
    return head + struct.pack("<II", 4, value)


def gguf_names(kind: str = "llama") -> dict[str, tuple[int, ...]]:
    """Tensors of a tiny model by their GGUF names, fastest dimension first, as GGUF has it."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (32, VOCABULARY), "output_norm.weight": (32,)}
    for block in range(BLOCKS):
        at = f"blk.{block}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"{at}{name}.weight"] = (32, 32)
        for name in ("ffn_gate", "ffn_up"):
            shapes[f"{at}{name}.weight"] = (32, 64)
        shapes[f"{at}ffn_down.weight"] = (64, 32)
        norms = ["attn_norm", "ffn_norm"] + (
            ["post_attention_norm", "post_ffw_norm"] if kind == "gemma2" else []
        )
        for name in norms:
            shapes[f"{at}{name}.weight"] = (32,)
    return shapes


def gguf(
    kind: str = "llama", *, metadata: Mapping[str, Any] | None = None, cut: int = 0, **changes: Any
) -> bytes:
    """A GGUF file: matrices as Q8_0, norms as F32. `changes`: version, tensors, offset (of the last tensor), type."""
    values = {
        "general.architecture": kind,
        f"{kind}.block_count": BLOCKS,
        f"{kind}.embedding_length": 32,
        f"{kind}.context_length": 64,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCABULARY)],
    } | dict(metadata or {})
    tensors = changes.get("tensors", list(gguf_names(kind).items()))
    infos, at = b"", 0
    for name, shape in tensors:
        matrix = len(shape) > 1
        count = 1
        for size in shape:
            count *= size
        place = changes.get("offset", at) if name == tensors[-1][0] else at
        type_number = changes.get("type", 8) if matrix else 0
        infos += gguf_string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        infos += struct.pack("<IQ", type_number, place)
        at += -(-(count // 32 * 34 if matrix else count * 4) // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", changes.get("version", 3), len(tensors), len(values))
    head += b"".join(gguf_value(k, v) for k, v in values.items()) + infos
    whole = head + bytes(-len(head) % 32) + bytes(at)
    return whole[: len(whole) - cut]
