"""The model architectures Modelpress knows, and how their tensors are named.

An architecture is here only if the contract test runs every technique on it; anything else is refused at upload.
Names are those of transformers' classes, as `architectures` in `config.json` gives them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from app.spec.base import Family

_BLOCK = re.compile(r"^(?P<prefix>.*?\b(?:layers|layer))\.(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Architecture:
    """One transformers class: its family, and the config key that counts its blocks."""

    name: str
    model_type: str
    family: Family
    blocks_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    positions_key: str = "max_position_embeddings"


def _decoders(*pairs: tuple[str, str]) -> list[Architecture]:
    return [Architecture(f"{name}ForCausalLM", kind, Family.CAUSAL_LM) for name, kind in pairs]


def _encoders(name: str, kind: str, **keys: str) -> list[Architecture]:
    heads = ("Model", "ForMaskedLM", "ForSequenceClassification")
    return [Architecture(name + head, kind, Family.ENCODER, **keys) for head in heads]


_DISTILBERT_KEYS = {"blocks_key": "n_layers", "hidden_key": "dim"}

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        *_decoders(
            ("Llama", "llama"),
            ("Mistral", "mistral"),
            ("Qwen2", "qwen2"),
            ("Qwen3", "qwen3"),
            ("Gemma", "gemma"),
            ("Gemma2", "gemma2"),
            ("Gemma3", "gemma3_text"),
            ("Phi3", "phi3"),
            ("SmolLM3", "smollm3"),
        ),
        *_encoders("Bert", "bert"),
        *_encoders("Roberta", "roberta"),
        *_encoders("XLMRoberta", "xlm-roberta"),
        *_encoders("DistilBert", "distilbert", **_DISTILBERT_KEYS),
        *_encoders("MPNet", "mpnet"),
    )
}


def block_index(name: str) -> int | None:
    """The index of the block a tensor belongs to, or None outside the blocks."""
    match = _BLOCK.match(name)
    return int(match["index"]) if match else None


def with_block_index(name: str, index: int) -> str:
    """The same tensor name in another block."""
    match = _BLOCK.match(name)
    if match is None:
        raise ValueError(f"{name} is outside the blocks")
    return f"{match['prefix']}.{index}.{match['rest']}"


def is_compressible(name: str, shape: tuple[int, ...]) -> bool:
    """True for the weight of a linear layer inside a block: two-dimensional, and no embedding (relative positions)."""
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and block_index(name) is not None
        and "embed" not in name
        and "relative_attention_bias" not in name
    )
