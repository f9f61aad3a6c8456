"""Which module of a block makes the input of which linear layers, so that a factor can move from one to the other.

Norms of the architectures in _SEQUENTIAL feed their layers channel by channel, and nothing else sees their output;
elsewhere attention and feed-forward part share a norm (Cohere) or it comes after them (OLMo 2). The value projection feeds the output
projection through weighted sums over tokens, which keep channels apart; the up projection feeds the down projection
through a product with the gate. Post-norm encoders (BERT and its like) also add a norm's output to the residual, and
an activation lies between their two feed-forward layers: only their value projections can be scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Feed:
    """A module and the linear layers that alone are given its output; names within the block."""

    source: str
    layers: tuple[str, ...]
    first_row: int = 0
    """Where in the source's outputs the layers' inputs begin; those of a fused projection are its last rows."""
    copies: int = 1
    """Heads that share one head of the source (grouped queries); 1 if each channel is read once."""
    head_size: int = 1
    """Channels of a head, if copies is more than 1."""

    def shared(self, per_input: Tensor) -> Tensor:
        """One value for each channel of the source, the largest of those its copies ask for: (inputs,) -> (channels,)."""
        return per_input.view(-1, self.copies, self.head_size).amax(1).flatten()

    def repeated(self, per_channel: Tensor) -> Tensor:
        """The value of each input, from that of its channel: (channels,) -> (inputs,)."""
        heads = per_channel.view(-1, 1, self.head_size)
        return heads.expand(-1, self.copies, -1).flatten()


# Blocks of these classes, `…DecoderLayer`, give each norm's output to the named layers alone.
_SEQUENTIAL = frozenset(
    {
        "Llama",
        "Mistral",
        "Mixtral",
        "Qwen2",
        "Qwen3",
        "Gemma",
        "Gemma2",
        "Gemma3",
        "Phi3",
        "SmolLM3",
        "Granite",
    }
    | {"Qwen2Moe", "Qwen3Moe"}
)


def feeds_of(block: nn.Module) -> list[Feed]:
    """All there are in a block of a known architecture, sources that come first in front."""
    known = {name for name, _ in block.named_modules()}
    # Blocks with a second norm around the feed-forward part (Gemma 2 and 3) call the one before it so.
    before_mlp = "pre_feedforward_layernorm"
    if before_mlp not in known:
        before_mlp = "post_attention_layernorm"
    sequential = type(block).__name__.removesuffix("DecoderLayer") in _SEQUENTIAL
    norms = [
        Feed("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Feed("input_layernorm", ("self_attn.qkv_proj",)),
        Feed(before_mlp, ("mlp.gate_proj", "mlp.up_proj")),
        Feed(before_mlp, ("mlp.gate_up_proj",)),
    ]
    candidates = [
        *(norms if sequential else ()),
        *(_value_feed(block, *names) for names in _VALUES if known.issuperset(names)),
        *(_up_feed(block, names[0]) for names in _GATED if known.issuperset(names)),
    ]
    return [feed for feed in candidates if known.issuperset((feed.source, *feed.layers))]


# Without a gate beside it, an activation follows the up projection.
_GATED = (("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"), ("mlp.gate_up_proj", "mlp.down_proj"))
_VALUES = (
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("self_attn.qkv_proj", "self_attn.o_proj"),
    ("attention.self.value", "attention.output.dense"),
    ("attention.v_lin", "attention.out_lin"),
    ("attention.attn.v", "attention.attn.o"),
)


def _value_feed(block: nn.Module, source: str, layer: str) -> Feed:
    inputs = block.get_parameter(f"{layer}.weight").shape[1]
    rows = block.get_parameter(f"{source}.weight").shape[0]
    if source.endswith("qkv_proj"):
        # Rows are those of the queries, as many as the output projection has inputs, then keys, then values.
        rows, first = (rows - inputs) // 2, (rows + inputs) // 2
    else:
        first = 0
    head_size = getattr(block.get_submodule("self_attn"), "head_dim", 1) if rows != inputs else 1
    return Feed(source, (layer,), first, inputs // rows, head_size)


def _up_feed(block: nn.Module, source: str) -> Feed:
    inputs = block.get_parameter("mlp.down_proj.weight").shape[1]
    rows = block.get_parameter(f"{source}.weight").shape[0]
    return Feed(source, ("mlp.down_proj",), rows - inputs)


def fold(block: nn.Module, feed: Feed, factor: Tensor) -> list[str]:
    """Move a factor per channel (channels,), positive, from a source to its layers; outputs stay as they were.

    Returns the names of the parameters that have changed.
    """
    changed = _divide_outputs(block, feed, factor)
    by_input = feed.repeated(factor)
    for name in feed.layers:
        block.get_parameter(f"{name}.weight").mul_(by_input)
    return [*changed, *(f"{name}.weight" for name in feed.layers)]


def _divide_outputs(block: nn.Module, feed: Feed, factor: Tensor) -> list[str]:
    """Divide what the source gives by a factor per channel, in place; the names of the parameters that changed."""
    source = block.get_submodule(feed.source)
    names = []
    for name, parameter in source.named_parameters():
        values = parameter[feed.first_row : feed.first_row + len(factor)]
        divisor = factor if values.dim() == 1 else factor.unsqueeze(1)
        # Gemma's norms multiply by 1 + weight.
        offset = 1.0 if name == "weight" and _is_gemma_norm(source) else 0.0
        values.copy_((values + offset) / divisor - offset)
        names.append(f"{feed.source}.{name}")
    return names


def _is_gemma_norm(module: nn.Module) -> bool:
    return type(module).__name__.startswith("Gemma") and type(module).__name__.endswith("RMSNorm")
