"""Where the intermediate channels of each architecture's feed-forward part lie in its weights.

A channel is an output of the layers that write it and an input of the one that reads it. Between them stand only
functions of each channel by itself, so a channel goes with its rows there and its column here. Mixtures of experts are
not here: a channel that few tokens reach cannot be judged by the text of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from app.spec.architectures import Architecture, name_within_block
from app.spec.facts import TensorFact


@dataclass(frozen=True)
class FeedForward:
    """The layers of a block's feed-forward part, by their names within the block."""

    writers: tuple[str, ...]
    reader: str
    projections: int = 1
    """How many projections lie one after the other in a writer's outputs: 2 where gate and up are one weight."""
    width_key: str = "intermediate_size"
    """What config.json calls the number of channels."""


@dataclass(frozen=True)
class ChannelAxis:
    """The dimension of a tensor that the channels lie along."""

    dimension: int
    copies: int = 1
    """How often all channels come along it, one time after the other."""


_GATED = FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_BERT = FeedForward(("intermediate.dense",), "output.dense")

_FEED_FORWARD: dict[str, FeedForward] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "cohere", "granite", "olmo2",
            "stablelm",
        ),
        _GATED,
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "mpnet", "electra", "deberta-v2"), _BERT),
    "phi3": FeedForward(("mlp.gate_up_proj",), "mlp.down_proj", projections=2),
    "starcoder2": FeedForward(("mlp.c_fc",), "mlp.c_proj"),
    "gpt2": FeedForward(("mlp.c_fc",), "mlp.c_proj", width_key="n_inner"),
    "gpt_neox": FeedForward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "opt": FeedForward(("fc1",), "fc2", width_key="ffn_dim"),
    "distilbert": FeedForward(("ffn.lin1",), "ffn.lin2", width_key="hidden_dim"),
    "modernbert": FeedForward(("mlp.Wi",), "mlp.Wo", projections=2),
}  # fmt: skip

# Blocks that end by adding what the feed-forward part gives. OPT's may have a norm after it, as its configuration says.
_ENDING_IN_A_SUM = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "cohere", "granite", "stablelm", "starcoder2", "gpt2",
        "gpt_neox",
    }
)  # fmt: skip


def feed_forward_of(architecture: Architecture) -> FeedForward | None:
    """The feed-forward part of an architecture's blocks; None for a mixture of experts."""
    return _FEED_FORWARD.get(architecture.model_type)


def last_layer_of(architecture: Architecture) -> str | None:
    """The layer whose outputs are added to what leaves a block, by its name within the block.

    None where a norm or experts come between, and for encoders.
    """
    layout = feed_forward_of(architecture)
    return layout.reader if layout is not None and architecture.model_type in _ENDING_IN_A_SUM else None


def can_fill_gaps(architecture: Architecture) -> bool:
    """Whether the last layer before missing blocks can make up for them."""
    return last_layer_of(architecture) is not None


def is_reader(name: str, architecture: Architecture) -> bool:
    """Whether a tensor is the weight that is given the channels."""
    layout = feed_forward_of(architecture)
    return layout is not None and name_within_block(name) == f"{layout.reader}.weight"


def channel_axis(name: str, architecture: Architecture) -> ChannelAxis | None:
    """Where the channels lie in a tensor; None where it has none."""
    layout = feed_forward_of(architecture)
    if layout is None:
        return None
    module, _, kind = name_within_block(name).rpartition(".")
    if module == layout.reader and kind == "weight":
        return ChannelAxis(0 if architecture.inputs_first else 1)
    if module in layout.writers and kind in ("weight", "bias"):
        transposed = architecture.inputs_first and kind == "weight"
        return ChannelAxis(1 if transposed else 0, layout.projections)
    return None


def widths_of(tensors: Iterable[TensorFact], architecture: Architecture) -> set[int]:
    """How many channels the blocks have: one number, for every model that transformers can build."""
    dimension = 0 if architecture.inputs_first else 1
    return {t.shape[dimension] for t in tensors if is_reader(t.name, architecture)}


def with_width(
    tensors: Iterable[TensorFact], architecture: Architecture, width: int
) -> tuple[TensorFact, ...]:
    """The same tensors with so many channels in every block."""
    return tuple(_with_width(t, channel_axis(t.name, architecture), width) for t in tensors)


def _with_width(tensor: TensorFact, axis: ChannelAxis | None, width: int) -> TensorFact:
    if axis is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis.dimension] = axis.copies * width
    return TensorFact(name=tensor.name, dtype=tensor.dtype, shape=tuple(shape))
