"""The training loop: AdamW, warm-up and cosine, a look at held-out text now and then, the best state kept.

It knows nothing of models and texts: an objective gives a differentiable loss per batch and the loss on held-out text.
A training that was killed goes on from its last snapshot, to the same losses (with `max_seconds`, whose clock the
learning rate follows, to nearly the same).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.spec.distill import DistillLogits
from workers.engine.distill.snapshots import Snapshots
from workers.engine.distill.texts import Batch
from workers.engine.technique import Progress

WARM_UP = 0.05
FINAL_RATE = 0.1
_CLIP_NORM = 1.0


class Objective(Protocol):
    """What is to become small."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the student's parameters under its own names, and those that only the loss needs."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch, differentiable by the parameters."""

    def held_out_loss(self, tick: Callable[[], None]) -> float:
        """Mean loss on text that is never trained on; calls `tick` every few seconds."""


@dataclass
class Training:
    """How it went. The parameters hold the best state when `train` returns."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped_by: str = "max_steps"
    losses: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Training:
        """The training of a snapshot's record; without one, a new training."""
        if record is None:
            return cls()
        curves = {key: [tuple(point) for point in record[key]] for key in ("losses", "held_out")}
        return cls(**{key: record[key] for key in asdict(cls())} | curves)

    @property
    def best(self) -> float:
        """The lowest held-out loss, training or not."""
        return min(loss for _, loss in self.held_out if not math.isnan(loss))

    @property
    def improved(self) -> bool:
        """Whether any look was better than the one before training."""
        return self.best < self.held_out[0][1]


def learning_rate_factor(share: float) -> float:
    """Share of the peak rate at a share of the training, both 0 to 1: linear warm-up, then cosine to a tenth."""
    if share < WARM_UP:
        return share / WARM_UP
    cosine = 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))
    return FINAL_RATE + (1 - FINAL_RATE) * cosine


def train(
    objective: Objective,
    batches: Iterator[Batch],
    spec: DistillLogits,
    *,
    zeros: Mapping[str, Tensor],
    snapshots: Snapshots,
    progress: Progress,
) -> Training:
    """Train until the steps or the seconds are used up or held-out loss no longer falls; leave the best state.

    `zeros` holds a mask for each parameter whose zeros must stay: True where it may change.
    """
    run = _Run(objective, spec, snapshots, progress)
    training = run.training
    batches = islice(batches, training.steps * spec.gradient_accumulation, None)
    if not training.held_out:
        run.look()
    while (reason := _reason_to_stop(training, spec, run.clock)) is None:
        run.step(batches)
        _hold_zeros(run.parameters, zeros)
        if training.steps % spec.evaluate_every == 0:
            run.look()
            run.save()
    training.stopped_by = reason
    if training.held_out[-1][0] != training.steps:
        run.look()
    snapshots.restore_best(run.parameters)
    training.seconds = run.clock.elapsed
    return training


class _Run:
    """A training under way: its parameters, its optimizer, and what has become of it so far."""

    def __init__(
        self, objective: Objective, spec: DistillLogits, snapshots: Snapshots, progress: Progress
    ) -> None:
        self.objective, self.spec, self.snapshots, self.progress = objective, spec, snapshots, progress
        self.parameters = objective.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.training = Training.of(snapshots.restore(self.parameters, self.optimizer))
        self.clock = _Clock(spec, self.training.seconds)

    def step(self, batches: Iterator[Batch]) -> None:
        """Add up the gradients of as many batches as the spec says, and move once."""
        training, spec = self.training, self.spec
        for group in self.optimizer.param_groups:
            group["lr"] = spec.learning_rate * learning_rate_factor(self.clock.share(training.steps + 1))
        total = 0.0
        for batch in islice(batches, spec.gradient_accumulation):
            loss = self.objective.loss(batch) / spec.gradient_accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            training.tokens += int(batch.mask.sum())
            self.progress(self.clock.share(training.steps), _message(training, spec, self.clock))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        training.steps += 1
        training.losses.append((float(training.steps), total))
        self.progress(self.clock.share(training.steps), _message(training, spec, self.clock))

    def look(self) -> None:
        """Measure held-out loss, and keep the state if it is the best so far."""
        training, clock, started = self.training, self.clock, self.clock.elapsed
        loss = self.objective.held_out_loss(
            lambda: self.progress(clock.share(training.steps), f"held-out loss after step {training.steps}")
        )
        clock.look_seconds = clock.elapsed - started
        if not training.held_out and not math.isfinite(loss):
            raise JobFailed(
                "The student's outputs are not finite before it was trained.",
                code="student_is_broken",
                hint="Look at the step before, or at the uploaded student: its weights hold NaN or infinity.",
            )
        is_best = not training.held_out or loss < training.best
        training.held_out.append((float(training.steps), loss))
        if is_best:
            self.snapshots.keep_best(training.steps, self.parameters)

    def save(self) -> None:
        """Note where the training is, for it to go on there."""
        self.training.seconds = self.clock.elapsed
        self.snapshots.save(self.training.steps, self.parameters, self.optimizer, asdict(self.training))


class _Clock:
    """How far a training is, by steps or by time, and what a look at the held-out text costs."""

    def __init__(self, spec: DistillLogits, spent: float) -> None:
        self._started = time.monotonic() - spent
        self._max_steps = spec.max_steps
        self._max_seconds = math.inf if spec.max_seconds is None else spec.max_seconds
        self.look_seconds = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the training began."""
        return time.monotonic() - self._started

    def share(self, step: int) -> float:
        """How far the training is at a step, 0 to 1: by steps, or by time where that runs out first.

        The learning rate follows it, so that a training that is cut short by the clock still ends on small steps.
        """
        return min(1.0, max(step / self._max_steps, self.elapsed / self._max_seconds))

    def is_up(self) -> bool:
        """Whether there is time for nothing but one more look."""
        return self.elapsed + self.look_seconds >= self._max_seconds


def _hold_zeros(parameters: dict[str, nn.Parameter], zeros: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in zeros.items():
            parameters[name].mul_(mask)


def _reason_to_stop(training: Training, spec: DistillLogits, clock: _Clock) -> str | None:
    if training.steps >= spec.max_steps:
        return "max_steps"
    # One step at least: a student that was never trained says nothing about the settings.
    if training.steps > 0 and clock.is_up():
        return "max_seconds"
    losses = [loss for _, loss in training.held_out]
    looks_since_best = len(losses) - 1 - losses.index(training.best)
    return "patience" if looks_since_best >= spec.patience else None


def _message(training: Training, spec: DistillLogits, clock: _Clock) -> str:
    share = clock.share(training.steps)
    loss = f"loss {training.losses[-1][1]:.4f}, " if training.losses else ""
    left = f", {clock.elapsed * (1 - share) / share:.0f} s left" if share else ""
    return (
        f"step {training.steps} of {spec.max_steps}, {loss}held-out {training.held_out[-1][1]:.4f}, "
        f"{training.tokens / clock.elapsed:.0f} tokens/s{left}"
    )
