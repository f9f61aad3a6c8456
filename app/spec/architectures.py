"""The model architectures Modelpress knows, and how their tensors are named.

An architecture is here only if the contract test runs every technique on it; anything else is refused at upload.
Names are those of transformers' classes, as `architectures` in `config.json` gives them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.spec.base import Family

_BLOCK = re.compile(r"^(?P<prefix>.*?\b(?:layers|layer|h))\.(?P<index>\d+)\.(?P<rest>.+)$")
_ROUTER = re.compile(r"\.(?:gate|shared_expert_gate)\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Architecture:
    """One transformers class: its family, the keys of its config, and what is peculiar to its weights."""

    name: str
    model_type: str
    family: Family
    blocks_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    positions_key: str = "max_position_embeddings"
    embedding_key: str | None = None
    """The width of the word embeddings, where it may differ from the hidden size."""
    head: str = "lm_head.weight"
    """The output layer of a language model; tied to the word embeddings where it is not stored."""
    expert_layers: tuple[str, str, str] | None = None
    """Names of an expert's gate, up and down projection; None where every token meets every weight."""
    inputs_first: bool = False
    """True where linear layers inside blocks are stored (in, out): GPT-2's Conv1D."""

    unpack_to_load: bool = False
    """True where transformers 5.23 cannot hold packed weights: ModernBERT's initialization looks for plain ones, and
    GPT-2 has no nn.Linear to replace."""

    keeps_first_block: bool = False
    """True where the first block is built differently (ModernBERT's has no norm before attention)."""

    is_convolutional: bool = False
    """True where there are no blocks of linear layers: nearly every weight is a convolution's."""

    @property
    def has_labels(self) -> bool:
        """Whether it classifies."""
        return self.name.endswith(("ForSequenceClassification", "ForImageClassification"))

    @property
    def takes_images(self) -> bool:
        """Whether it is given images, and not tokens."""
        return self.family is Family.IMAGE_CLASSIFIER


def _decoders(*pairs: tuple[str, str], **keys: Any) -> list[Architecture]:
    return [Architecture(f"{name}ForCausalLM", kind, Family.CAUSAL_LM, **keys) for name, kind in pairs]


def _encoders(name: str, kind: str, **keys: Any) -> list[Architecture]:
    heads = ("Model", "ForMaskedLM", "ForSequenceClassification")
    return [Architecture(name + head, kind, Family.ENCODER, **keys) for head in heads]


def _image_classifiers(*pairs: tuple[str, str], **keys: Any) -> list[Architecture]:
    return [
        Architecture(f"{name}ForImageClassification", kind, Family.IMAGE_CLASSIFIER, **keys)
        for name, kind in pairs
    ]


_DISTILBERT_KEYS = {"blocks_key": "n_layers", "hidden_key": "dim"}
_GPT2 = Architecture(
    "GPT2LMHeadModel", "gpt2", Family.CAUSAL_LM,
    blocks_key="n_layer", hidden_key="n_embd", positions_key="n_positions", inputs_first=True, unpack_to_load=True,
)  # fmt: skip

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
            ("Cohere", "cohere"),
            ("Granite", "granite"),
            ("Olmo2", "olmo2"),
            ("StableLm", "stablelm"),
            ("Starcoder2", "starcoder2"),
        ),
        _GPT2,
        *_decoders(("GPTNeoX", "gpt_neox"), head="embed_out.weight"),
        *_decoders(("OPT", "opt"), embedding_key="word_embed_proj_dim"),
        *_decoders(("Mixtral", "mixtral"), expert_layers=("w1", "w3", "w2")),
        *_decoders(
            ("Qwen2Moe", "qwen2_moe"),
            ("Qwen3Moe", "qwen3_moe"),
            expert_layers=("gate_proj", "up_proj", "down_proj"),
        ),
        *_encoders("Bert", "bert"),
        *_encoders("Roberta", "roberta"),
        *_encoders("XLMRoberta", "xlm-roberta"),
        *_encoders("DistilBert", "distilbert", **_DISTILBERT_KEYS),
        *_encoders("MPNet", "mpnet"),
        *_encoders("Electra", "electra", embedding_key="embedding_size"),
        *_encoders("ModernBert", "modernbert", unpack_to_load=True, keeps_first_block=True),
        *_encoders("DebertaV2", "deberta-v2"),
        *_image_classifiers(("ViT", "vit"), ("DeiT", "deit")),
        *_image_classifiers(
            ("ResNet", "resnet"),
            ("MobileNetV1", "mobilenet_v1"),
            ("MobileNetV2", "mobilenet_v2"),
            is_convolutional=True,
        ),
    )
}


def architecture_in(config: Mapping[str, Any]) -> Architecture:
    """The architecture a config.json names. Raises KeyError for one that Modelpress does not know."""
    return ARCHITECTURES[config["architectures"][0]]


def is_router(name: str) -> bool:
    """True for the weight that decides which experts a token meets, or how much of the shared one."""
    return _ROUTER.search(name) is not None


def is_expert(name: str) -> bool:
    """True for a weight that only some tokens meet."""
    return _EXPERT.search(name) is not None


def blocks_name(name: str) -> str | None:
    """The list of blocks a tensor belongs to, e.g. `model.layers`, or None outside the blocks."""
    match = _BLOCK.match(name)
    return match["prefix"] if match else None


def block_index(name: str) -> int | None:
    """The index of the block a tensor belongs to, or None outside the blocks."""
    match = _BLOCK.match(name)
    return int(match["index"]) if match else None


def name_within_block(name: str) -> str:
    """A tensor's name within its block; empty outside the blocks."""
    match = _BLOCK.match(name)
    return match["rest"] if match else ""


def with_block_index(name: str, index: int) -> str:
    """The same tensor name in another block."""
    match = _BLOCK.match(name)
    if match is None:
        raise ValueError(f"{name} is outside the blocks")
    return f"{match['prefix']}.{index}.{match['rest']}"


def is_image_layer(name: str, shape: tuple[int, ...]) -> bool:
    """True for the weight of any convolution or linear layer of an image classifier: (out, in / groups, rows, columns) or
    (out, in). Norms have vectors, and embeddings of positions bear no `.weight`."""
    return len(shape) in (2, 4) and name.endswith(".weight")


def is_graph_layer(shape: tuple[int, ...]) -> bool:
    """The same of an ONNX graph, where names say nothing; constants that are added have but one entry on some axes."""
    return (len(shape) == 4 and shape[0] > 1) or (len(shape) == 2 and min(shape) > 1)


def is_compressible(name: str, shape: tuple[int, ...]) -> bool:
    """True for the weight of a linear layer inside a block: two-dimensional, and no embedding (relative positions).

    Routers are among them, though no technique touches one: see `is_router`.
    """
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and block_index(name) is not None
        and "embed" not in name
        and "relative_attention_bias" not in name
    )
