"""Facts of a GGUF model, its tensors named and typed as they will be once converted to safetensors."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from app.intake.gguf_header import GgufHeader, GgufTensor, read_gguf
from app.intake.refusals import refused
from app.intake.shapes import check_shapes
from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family
from app.spec.facts import ModelFacts, TensorFact

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma 2 and 3 norm what goes into the feed-forward and what comes out of either part.
_FOUR_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK_OF = {
    "gemma2": _BLOCK | _FOUR_NORMS,
    "gemma3": _BLOCK | _FOUR_NORMS,
    "phi3": _BLOCK | {"ffn_up": "mlp.gate_up_proj"},
}
# Computed from the config by transformers.
_DROPPED = re.compile(
    r"rope_freqs\.weight|rope_factors_(?:long|short)\.weight|blk\.\d+\.attn_rot_embd\.weight"
)
_BLOCK_NAME = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)\.(weight|bias)")
_TOP_NAME = re.compile(r"([a-z_]+)\.(weight|bias)")
_KEPT_TYPES = ("F32", "F16", "BF16")


def gguf_facts(path: Path, name: str) -> ModelFacts:
    """Facts of the model in a GGUF file. Raises IntakeError."""
    header = read_gguf(path, name)
    kind = header.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise refused(
            "unknown_architecture",
            f"{name} has architecture {str(kind)[:50]!r}, which Modelpress does not know as GGUF.",
            hint="Supported as GGUF: " + ", ".join(sorted(_ARCHITECTURES)) + ".",
        )
    tensors = tuple(_fact(t, kind, name) for t in header.tensors if not _DROPPED.fullmatch(t.name))
    architecture = ARCHITECTURES[_ARCHITECTURES[kind]]
    embedding = next((t for t in tensors if t.name == "model.embed_tokens.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise refused("tensor_missing", f"{name} has no token_embd.weight.")
    facts = ModelFacts(
        format="gguf",
        architecture=architecture.name,
        family=Family.CAUSAL_LM,
        parameters=sum(t.elements for t in tensors),
        dtype=_main_type(header),
        weight_bytes=path.stat().st_size,
        hidden_size=_integer(header, f"{kind}.embedding_length", name),
        num_blocks=_integer(header, f"{kind}.block_count", name),
        vocab_size=embedding.shape[0],
        max_positions=_integer(header, f"{kind}.context_length", name),
        tied_embeddings=not any(t.name == "lm_head.weight" for t in tensors),
        attention_heads=_count(header, f"{kind}.attention.head_count"),
        key_value_heads=_count(header, f"{kind}.attention.head_count_kv"),
        tensors=tensors,
    )
    tokens = header.array_lengths.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens > facts.vocab_size:
        raise refused("config_mismatch", f"{name} has {tokens} tokens but embeddings for {facts.vocab_size}.")
    check_shapes(facts, name)
    return facts


def _count(header: GgufHeader, key: str) -> int | None:
    """A number that is the same for all blocks; None where it is not there, or a list."""
    value = header.metadata.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _fact(tensor: GgufTensor, kind: str, name: str) -> TensorFact:
    dtype = tensor.type if tensor.type in _KEPT_TYPES else "BF16"
    translated = _translated(tensor.name, kind)
    if translated is None:
        raise refused("unknown_architecture", f"{name}: a {kind} model has no tensor {tensor.name}.")
    return TensorFact(name=translated, dtype=dtype, shape=tensor.shape)


def _translated(name: str, kind: str) -> str | None:
    """The tensor's name in Hugging Face's layout."""
    if match := _BLOCK_NAME.fullmatch(name):
        part = _BLOCK_OF.get(kind, _BLOCK).get(match[2])
        return f"model.layers.{int(match[1])}.{part}.{match[3]}" if part else None
    match = _TOP_NAME.fullmatch(name)
    part = _TOP.get(match[1]) if match else None
    return f"{part}.{match[2]}" if match and part else None


def _integer(header: GgufHeader, key: str, name: str) -> int:
    value = header.metadata.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise refused("config_invalid", f"{name} has no usable {key}.")
    return value


def _main_type(header: GgufHeader) -> str:
    totals: Counter[str] = Counter()
    for tensor in header.tensors:
        totals[tensor.type] += tensor.bytes
    return totals.most_common(1)[0][0]
