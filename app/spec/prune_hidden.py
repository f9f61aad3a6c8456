"""Parameters of narrowing the hidden width of a language model, and where that width lies in its tensors.

The hidden width is that of the states which pass from block to block. A rotation of these states changes nothing where
each norm but divides by their length (RMSNorm, its gains moved into the layers that read it) and where the blocks add
what they give as it is: not where a norm comes after a layer (Gemma 2 and 3, OLMo 2) or subtracts a mean (LayerNorm).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from app.spec.architectures import Architecture
from app.spec.attention_heads import counts_in, groups_left, heads_divide_hidden
from app.spec.base import Family, Step
from app.spec.facts import ModelFacts, TensorFact
from app.spec.onnx_operators import architecture_named

_MODEL_TYPES = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "granite", "mixtral", "qwen2_moe", "qwen3_moe",
    }
)  # fmt: skip
ATTENTION_NORM, FEED_FORWARD_NORM = "input_layernorm", "post_attention_layernorm"
"""The norms of a block, which take the states."""
FINAL_NORM, EMBEDDING, HEAD = "norm", "embed_tokens", "lm_head"
_NORMS = frozenset({ATTENTION_NORM, FEED_FORWARD_NORM, FINAL_NORM})
_READERS = frozenset(
    {
        EMBEDDING, HEAD, "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "gate",
        "shared_expert_gate",
    }
)  # fmt: skip
_WRITERS = frozenset({"o_proj", "down_proj", "w2"})


class PruneHidden(Step):
    """Narrow the hidden width, that of the states which pass from block to block: of all directions they have on
    calibration text, the strongest stay, the same in every block.

    Leaves a smaller dense model that any loader reads by its config alone. Runs the model over calibration text twice,
    block by block, with one block in memory beside its narrow self.
    """

    families: ClassVar[frozenset[Family]] = frozenset({Family.CAUSAL_LM})
    needs_calibration: ClassVar[bool] = True

    technique: Literal["prune.hidden"] = "prune.hidden"
    drop_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the hidden width to remove, before rounding. 0.25 if `hidden_size` is not given either."""
    hidden_size: Annotated[int, Field(ge=1)] | None = None
    """The width to leave, exactly. Give this or `drop_ratio`."""
    round_to: Annotated[int, Field(ge=1, le=65_536)] = 16
    """With `drop_ratio`, the width that is left is the nearest multiple of this, and of the number of heads where the
    configuration asks for that (Llama), below the width there was; of two as near, the larger."""
    repair: bool = True
    """Refit by least squares, block by block, the layers that read the states and those that add to them. False: they are
    turned and cut as they are."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text the states are taken from: better dozens for each direction that stays than few."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    """Tokens of one window of calibration text; cut to what the model can take."""

    @model_validator(mode="after")
    def _one_amount(self) -> PruneHidden:
        if self.hidden_size is not None and self.drop_ratio is not None:
            raise ValueError("give hidden_size or drop_ratio, not both")
        return self

    def width_after(self, width: int, multiple: int) -> int | None:
        """What is left of a width, a multiple of `multiple`; None where that cannot be."""
        if self.hidden_size is not None:
            fits = self.hidden_size < width and self.hidden_size % multiple == 0
            return self.hidden_size if fits else None
        unit = math.lcm(self.round_to, multiple)
        most = (width - 1) // unit
        if most == 0:
            return None
        ratio = 0.25 if self.drop_ratio is None else self.drop_ratio
        return unit * min(max(math.floor((1 - ratio) * width / unit + 0.5), 1), most)


def has_narrowable_states(architecture: Architecture) -> bool:
    """Whether the states of such a model can be turned and cut, and its configuration can say so."""
    return architecture.model_type in _MODEL_TYPES


def adds_one_to_gains(architecture: Architecture) -> bool:
    """Whether norms multiply by one more than their weight, and embeddings by the root of the hidden width: Gemma."""
    return architecture.model_type == "gemma"


def hidden_axis(name: str) -> int | None:
    """The dimension of a tensor that the hidden width lies along, in the architectures above; None where it has none."""
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if leaf in _READERS and kind == "weight":
        return 1
    return 0 if leaf in _WRITERS or leaf in _NORMS else None


def hidden_width_of(tensors: Iterable[TensorFact]) -> int:
    """The hidden width of a model of these tensors."""
    return next(t.shape[axis] for t in tensors if (axis := hidden_axis(t.name)) is not None)


def width_multiple(architecture: Architecture, heads: int) -> int:
    """What a hidden width must be a multiple of, with so many query heads."""
    return heads if heads_divide_hidden(architecture) else 1


def multiple_for(tensors: Iterable[TensorFact], facts: ModelFacts) -> int:
    """The same for a model of these tensors, where earlier steps may have removed heads; 1 where nothing is known of heads."""
    counts, architecture = counts_in(facts), architecture_named(facts.architecture)
    if counts is None:
        return 1
    return width_multiple(architecture, groups_left(tensors, architecture, counts) * counts.per_group)


def facts_after(step: Step, tensors: tuple[TensorFact, ...], facts: ModelFacts) -> ModelFacts:
    """What a later step must know of the model: the hidden width that this one leaves of a model of these tensors."""
    if not isinstance(step, PruneHidden) or not has_narrowable_states(architecture_named(facts.architecture)):
        return facts
    width = step.width_after(hidden_width_of(tensors), multiple_for(tensors, facts))
    return facts if width is None else facts.model_copy(update={"hidden_size": width})


def with_hidden_width(tensors: Iterable[TensorFact], width: int) -> tuple[TensorFact, ...]:
    """The same tensors, of one of the architectures above, with so wide states."""
    return tuple(_with_width(t, width) for t in tensors)


def _with_width(tensor: TensorFact, width: int) -> TensorFact:
    axis = hidden_axis(tensor.name)
    if axis is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = width
    return TensorFact(name=tensor.name, dtype=tensor.dtype, shape=tuple(shape))
