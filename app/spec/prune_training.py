"""Parameters of pruning while training."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.spec.base import Family, Frozen
from app.spec.quantize import GlobPatterns
from app.spec.text_training import TextTraining

Share = Annotated[float, Field(gt=0, lt=1)]
StepNumber = Annotated[int, Field(ge=1)]


class CubicSchedule(Frozen):
    """Sparsity grows as 1 − (1 − t)³ from `begin` to `end`: fast while much is redundant, slowly where little is left (Zhu
    and Gupta 2017)."""

    shape: Literal["cubic"] = "cubic"
    sparsity: Share = 0.5
    """Share of weights that are zero in the end."""
    begin: StepNumber | None = None
    """Step before which nothing is pruned. Null: a tenth of `max_steps`."""
    end: StepNumber | None = None
    """Step from which on the sparsity is reached; what follows is recovery. Null: six tenths of `max_steps`."""
    every: StepNumber = 10
    """Steps between two cuts."""

    @model_validator(mode="after")
    def _begins_first(self) -> Self:
        if self.begin is not None and self.end is not None and self.begin >= self.end:
            raise ValueError(f"begin ({self.begin}) must be before end ({self.end})")
        return self

    def points_within(self, max_steps: int) -> tuple[tuple[int, float], ...]:
        """(step, sparsity) of each cut of a training of so many steps."""
        begin = max(1, max_steps // 10) if self.begin is None else self.begin
        end = max(begin, round(0.6 * max_steps)) if self.end is None else self.end
        steps = [*range(begin + self.every, end, self.every), end]
        return tuple((s, self.sparsity * (1 - ((end - s) / max(1, end - begin)) ** 3)) for s in steps)


class ListedSchedule(Frozen):
    """Cuts at the steps named, each to the sparsity named."""

    shape: Literal["list"] = "list"
    points: Annotated[tuple[tuple[StepNumber, Share], ...], Field(min_length=1, max_length=10_000)]
    """Pairs of step and sparsity, steps ascending, e.g. `[[20, 0.3], [60, 0.5]]`. What is left after the last is recovery."""

    def points_within(self, max_steps: int) -> tuple[tuple[int, float], ...]:  # noqa: ARG002
        """As they were given."""
        return self.points


class ScheduledCuts(Frozen):
    """Weights go at the steps of a schedule, and hold until the next; one that was cut too early can come back there."""

    name: Literal["magnitude", "movement"] = "magnitude"
    """Which weights go. `magnitude`: small ones. `movement`: those that training moves towards zero, by the sum of
    w · ∂L/∂w over all batches so far (Sanh et al. 2020); better where training is long and differs from what came before."""
    schedule: Annotated[CubicSchedule | ListedSchedule, Field(discriminator="shape")] = CubicSchedule()
    scope: Literal["layer", "global"] = "layer"
    """`layer`: every layer gets the same sparsity. `global`: one threshold for all."""


class LearnedGates(Frozen):
    """Every weight has a gate that is drawn at random while it is trained, and closed for good where that costs the loss less
    than `penalty` saves: min L(w) + λ‖w‖₀ by hard-concrete gates (Louizos et al. 2018). The sparsity is what comes of it."""

    name: Literal["l0"] = "l0"
    penalty: Annotated[float, Field(gt=0, le=1e6)] = 10.0
    """Added to the loss, times the share of the layers' weights that is left: λ times the number of those weights."""
    gate_learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Peak rate of the gates, on the same course as `learning_rate`. They have 5.4 to go until they are closed."""


class PruneTraining(TextTraining):
    """Set weights of linear layers to zero little by little while the others are trained, by the original's outputs, by the
    true next token, or by both.

    Loss, text and loop are those of `distill.logits`; `hard_label_weight` 1 is plain cross-entropy, and needs no teacher in
    memory. Of the states that have the final sparsity, the best on held-out text is kept. The file does not get smaller:
    zeros are stored, and the report says so (`dense_zeros`).
    """

    max_seconds: ClassVar[None] = None
    """None: a schedule of steps would be cut off by a clock."""

    technique: Literal["prune.training"] = "prune.training"
    method: Annotated[ScheduledCuts | LearnedGates, Field(discriminator="name")] = ScheduledCuts()
    ignore: GlobPatterns = ()
    """Layers left as they are: shell patterns on module names, e.g. `*.layers.0.*`. They are trained all the same."""

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(step, sparsity) of each cut; none where gates decide."""
        method = self.method
        return method.schedule.points_within(self.max_steps) if isinstance(method, ScheduledCuts) else ()

    def asks_teacher(self, family: Family) -> bool:
        """Whether the original is asked for its outputs: encoders have no next token to learn from instead."""
        return self.hard_label_weight < 1 or family is not Family.CAUSAL_LM

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        steps = [step for step, _ in self.points]
        if any(first >= second for first, second in pairwise(steps)):
            raise ValueError("the schedule's steps must ascend")
        if steps and steps[0] == 1 and self.method.name == "movement":
            raise ValueError(
                "the schedule's first cut is at step 1, before which nothing has moved: begin at step 2 or later, or use magnitude"
            )
        if steps and steps[-1] > self.max_steps:
            raise ValueError(
                f"the schedule ends at step {steps[-1]}, after max_steps ({self.max_steps}): give more steps or a shorter one"
            )
        return self
