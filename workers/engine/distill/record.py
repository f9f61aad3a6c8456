"""How a training went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Training:
    """How it went. The parameters hold the best state when `train` returns."""

    settled: int = 0
    """Looks before this step do not count: what is trained is not yet what it is to become."""
    steps: int = 0
    amount: int = 0
    """Tokens or images that were learned from."""
    seconds: float = 0.0
    stopped_by: str = "max_steps"
    losses: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, record: Mapping[str, Any] | None, *, settled: int) -> Training:
        """The training of a snapshot's record; without one, a new training."""
        if record is None:
            return cls(settled)
        curves = {key: [tuple(point) for point in record[key]] for key in ("losses", "held_out")}
        return cls(**{key: record[key] for key in asdict(cls())} | curves)

    @property
    def counted(self) -> list[float]:
        """The held-out losses from which the best is taken."""
        return [loss for step, loss in self.held_out if step >= self.settled]

    @property
    def best(self) -> float:
        """The lowest held-out loss that counts, training or not; infinite where there is none."""
        return min((loss for loss in self.counted if not math.isnan(loss)), default=math.inf)

    @property
    def improved(self) -> bool:
        """Whether any look was better than the one before training."""
        return self.best < self.held_out[0][1]

    def metrics(self) -> dict[str, float | int | str | None]:
        """What a report says of it."""
        return {
            "held_out_loss_before": self.held_out[0][1],
            "held_out_loss_after": self.best,
            "steps": self.steps,
            "tokens_per_second": self.amount / self.seconds,
            "stopped_by": self.stopped_by,
        }

    def curves(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Losses by step, without the points where training diverged, which JSON cannot carry."""
        both = {"training_loss": self.losses, "held_out_loss": self.held_out}
        return {name: tuple(p for p in points if math.isfinite(p[1])) for name, points in both.items()}
