"""Scales of the key-value cache: which architectures have them, and the tensors they are stored as.

Names and shapes are those that compressed-tensors 0.20 makes room for, and that vLLM's loaders look for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from app.spec.architectures import Architecture
from app.spec.facts import TensorFact

KEY_SCALE, VALUE_SCALE = "k_scale", "v_scale"
_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"})
_PROJECTIONS = (".self_attn.k_proj.weight", ".self_attn.qkv_proj.weight")


def can_scale_cache(architecture: Architecture) -> bool:
    """Whether transformers was seen to round such a model's cache by its scales, so that results are measured with it."""
    return architecture.model_type in _MODEL_TYPES


def cache_scale_facts(tensors: Iterable[TensorFact]) -> Iterator[TensorFact]:
    """The scales of every attention of a model that has these tensors: (1,) each, in the dtype of its weights."""
    for tensor in tensors:
        if tensor.name.endswith(_PROJECTIONS):
            attention = tensor.name.removesuffix(".weight").rpartition(".")[0]
            for scale in (KEY_SCALE, VALUE_SCALE):
                yield TensorFact(name=f"{attention}.{scale}", dtype=tensor.dtype, shape=(1,))
