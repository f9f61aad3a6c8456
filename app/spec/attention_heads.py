"""Where the heads of attention lie in the weights of each architecture, and how many its configuration can carry.

A head goes with its rows in the projections that write it and its columns in the one that reads it. Query heads that
share a key and a value head are a group, and go together. Only architectures are here whose configuration names the
size of a head apart from their number (`head_dim`), and whose normalizations know one head alone: not OLMo 2 (one norm
over all heads), Cohere and StableLM (a norm of its own for each), nor GPT-2, GPT-NeoX, OPT, BERT and its like, where the hidden
width divided by the number of heads is the size of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from app.spec.architectures import Architecture, name_within_block
from app.spec.facts import ModelFacts, TensorFact
from app.spec.onnx_operators import architecture_named
from app.spec.prune import PruneHeads

HEADS_KEY, GROUPS_KEY, SIZE_KEY = "num_attention_heads", "num_key_value_heads", "head_dim"
"""What config.json calls them."""

_READER = "self_attn.o_proj"
# What lies one after the other along a projection's outputs: a whole group's query heads, or its one key or value head.
_SEPARATE: dict[str, tuple[bool, ...]] = {
    "self_attn.q_proj": (True,),
    "self_attn.k_proj": (False,),
    "self_attn.v_proj": (False,),
}
_FUSED: dict[str, tuple[bool, ...]] = {"self_attn.qkv_proj": (True, False, False)}
_WRITERS: dict[str, dict[str, tuple[bool, ...]]] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite", "starcoder2", "mixtral",
            "qwen2_moe", "qwen3_moe",
        ),
        _SEPARATE,
    ),
    "phi3": _FUSED,
}  # fmt: skip
# transformers 5.23 refuses their configurations otherwise, whatever head_dim says.
_HIDDEN_IS_MULTIPLE = frozenset({"llama", "gemma2", "gemma3_text"})


@dataclass(frozen=True)
class HeadCounts:
    """The heads of one attention."""

    groups: int
    """Key and value heads."""
    per_group: int
    """Query heads that share one."""
    size: int
    """Channels of a head."""

    @property
    def queries(self) -> int:
        """Query heads."""
        return self.groups * self.per_group

    def channels(self, *, of_queries: bool) -> int:
        """Channels that a group has in the queries, or in the keys and values."""
        return self.size * (self.per_group if of_queries else 1)


@dataclass(frozen=True)
class HeadAxis:
    """The dimension of a tensor that the heads lie along, and whose heads come along it, one kind after the other."""

    dimension: int
    of_queries: tuple[bool, ...]

    def length(self, counts: HeadCounts, groups: int) -> int:
        """Its length with so many groups."""
        return sum(groups * counts.channels(of_queries=kind) for kind in self.of_queries)


def has_removable_heads(architecture: Architecture) -> bool:
    """Whether a configuration of this architecture can say what is left."""
    return architecture.model_type in _WRITERS


def heads_divide_hidden(architecture: Architecture) -> bool:
    """Whether a configuration is refused in which the number of query heads does not divide the hidden width."""
    return architecture.model_type in _HIDDEN_IS_MULTIPLE


def reads_heads(name: str, architecture: Architecture) -> bool:
    """Whether a tensor is the weight that is given the heads' outputs."""
    return has_removable_heads(architecture) and name_within_block(name) == f"{_READER}.weight"


def head_axis(name: str, architecture: Architecture) -> HeadAxis | None:
    """Where the heads lie in a tensor; None where it has none."""
    if reads_heads(name, architecture):
        return HeadAxis(1, (True,))
    module, _, kind = name_within_block(name).rpartition(".")
    of_queries = _WRITERS.get(architecture.model_type, {}).get(module)
    return HeadAxis(0, of_queries) if of_queries and kind in ("weight", "bias") else None


def head_counts(
    tensors: Iterable[TensorFact], architecture: Architecture, *, heads: int, groups: int
) -> HeadCounts | None:
    """The heads of every block of a model with so many query heads and groups; None where its tensors do not say."""
    inputs = {t.shape[1] for t in tensors if reads_heads(t.name, architecture)}
    if len(inputs) != 1 or heads % groups or min(inputs) % heads:
        return None
    return HeadCounts(groups, heads // groups, min(inputs) // heads)


def counts_in(facts: ModelFacts) -> HeadCounts | None:
    """The heads of an uploaded model; None where nothing can be said of them."""
    if facts.attention_heads is None:
        return None
    groups = facts.key_value_heads or facts.attention_heads
    architecture = architecture_named(facts.architecture)
    return head_counts(facts.tensors, architecture, heads=facts.attention_heads, groups=groups)


def groups_left(tensors: Iterable[TensorFact], architecture: Architecture, counts: HeadCounts) -> int:
    """How many groups there are, where earlier steps may have removed some of those counted."""
    inputs = next(t.shape[1] for t in tensors if reads_heads(t.name, architecture))
    return inputs // counts.channels(of_queries=True)


def possible_groups(
    architecture: Architecture, counts: HeadCounts, groups: int, hidden_size: int
) -> list[int]:
    """The smaller numbers of groups that a configuration can carry, ascending."""
    must_divide = heads_divide_hidden(architecture)
    return [n for n in range(1, groups) if not must_divide or hidden_size % (n * counts.per_group) == 0]


def without_heads(
    step: PruneHeads, tensors: tuple[TensorFact, ...], facts: ModelFacts
) -> tuple[TensorFact, ...]:
    """The tensors that the step leaves of these, where it can be said how many heads there are and any can go."""
    counts, architecture = counts_in(facts), architecture_named(facts.architecture)
    if counts is None:
        return tensors
    groups = groups_left(tensors, architecture, counts)
    after = step.groups_after(groups, possible_groups(architecture, counts, groups, facts.hidden_size))
    return tensors if after is None else with_groups(tensors, architecture, counts, after)


def with_groups(
    tensors: Iterable[TensorFact], architecture: Architecture, counts: HeadCounts, groups: int
) -> tuple[TensorFact, ...]:
    """The same tensors with so many groups in every block."""
    return tuple(_with_groups(t, head_axis(t.name, architecture), counts, groups) for t in tensors)


def _with_groups(tensor: TensorFact, axis: HeadAxis | None, counts: HeadCounts, groups: int) -> TensorFact:
    if axis is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis.dimension] = axis.length(counts, groups)
    return TensorFact(name=tensor.name, dtype=tensor.dtype, shape=tuple(shape))
