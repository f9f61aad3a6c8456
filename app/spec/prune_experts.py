"""Parameters of removing experts from a mixture, and what that does to its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.spec.base import Family, Step
from app.spec.facts import TensorFact

EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts")
"""What config.json calls the number of experts of a block: Mixtral the first, Qwen the second."""
_NUMBERED = re.compile(r"^(?P<before>.*\.experts\.)(?P<number>\d+)(?P<after>\..+)$")


class PruneExperts(Step):
    """Remove those experts of each block of a mixture that calibration text needs least, as many in every block, with
    their rows of the router.

    Leaves a smaller model that any loader reads by its config alone. Each token still meets as many experts; those it
    would have met are replaced by the router's next choice.
    """

    families: ClassVar[frozenset[Family]] = frozenset({Family.CAUSAL_LM})
    needs_calibration: ClassVar[bool] = True

    technique: Literal["prune.experts"] = "prune.experts"
    drop_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of each block's experts to remove. At least as many stay as a token meets."""
    round_to: Annotated[int, Field(ge=1, le=1024)] = 1
    """The number that is left is a multiple of this, for runtimes that spread experts over so many devices."""
    criterion: Literal["contribution", "usage", "random"] = "contribution"
    """Which experts go. `contribution`: those whose outputs, times what the router gives them, are shortest, summed over
    tokens (Lasby et al. 2025, REAP, whose mean is over an expert's own tokens). `usage`: those that the router chooses least
    often. `random`: any; the baseline to compare with."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text that are routed: better hundreds for each expert than few."""

    def experts_after(self, experts: int, per_token: int) -> int | None:
        """How many of `experts` stay: the nearest number that may; None where there is none. Of two as near, the larger."""
        possible = [n for n in range(per_token, experts) if n % self.round_to == 0]
        wanted = (1 - self.drop_ratio) * experts
        return min(possible, key=lambda n: (abs(n - wanted), -n), default=None)


def expert_number(name: str) -> int | None:
    """Which expert of its block a tensor belongs to; None for one that is no expert's."""
    match = _NUMBERED.match(name)
    return int(match["number"]) if match else None


def with_expert_number(name: str, number: int) -> str:
    """The name of the same tensor of another expert."""
    return _NUMBERED.sub(rf"\g<before>{number}\g<after>", name)


def has_row_per_expert(name: str) -> bool:
    """Whether a tensor is a router's weight, (experts, hidden); the gate of a shared expert is none."""
    return name.endswith(".gate.weight")


def experts_in(tensors: Iterable[TensorFact]) -> int:
    """How many experts the blocks of a mixture have; 0 for other models."""
    return max((n + 1 for t in tensors if (n := expert_number(t.name)) is not None), default=0)


def with_experts(tensors: Iterable[TensorFact], count: int) -> tuple[TensorFact, ...]:
    """The same tensors with so many experts in every block; it does not matter which, for all are of one size."""
    return tuple(_cut(t, count) for t in tensors if (expert_number(t.name) or 0) < count)


def _cut(tensor: TensorFact, count: int) -> TensorFact:
    if not has_row_per_expert(tensor.name):
        return tensor
    return TensorFact(name=tensor.name, dtype=tensor.dtype, shape=(count, *tensor.shape[1:]))
