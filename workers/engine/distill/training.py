"""The training loop: AdamW, warm-up and cosine, a look at held-out text now and then, the best state kept.

It knows nothing of models and texts: an objective gives a differentiable loss per batch and the loss on held-out text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.spec.distill import DistillLogits
from workers.engine.distill.texts import Batch
from workers.engine.technique import Progress

WARM_UP = 0.05
FINAL_RATE = 0.1
_CLIP_NORM = 1.0


class Objective(Protocol):
    """What is to become small."""

    student: nn.Module

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch, differentiable by the student's parameters."""

    def held_out_loss(self, tick: Callable[[], None]) -> float:
        """Mean loss on text that is never trained on; calls `tick` every few seconds."""


@dataclass
class Training:
    """How it went. The student holds the best state when `train` returns."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped_by: str = "max_steps"
    losses: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)

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
    progress: Progress,
) -> Training:
    """Train until the steps or the seconds are used up or held-out loss no longer falls; leave the best state.

    `zeros` holds a mask for each parameter whose zeros must stay: True where it may change.
    """
    training = Training()
    clock = _Clock(spec)
    parameters = dict(objective.student.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    best = _look(training, objective, clock, progress, {})
    while (reason := _reason_to_stop(training, spec, clock)) is None:
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * learning_rate_factor(clock.share(training.steps + 1))
        batch = next(batches)
        loss = objective.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.values(), _CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        _hold_zeros(parameters, zeros)
        training.steps += 1
        training.tokens += int(batch.mask.sum())
        training.losses.append((float(training.steps), float(loss.detach())))
        progress(clock.share(training.steps), _message(training, spec, clock))
        if training.steps % spec.evaluate_every == 0:
            best = _look(training, objective, clock, progress, best)
    training.stopped_by = reason
    if training.held_out[-1][0] != training.steps:
        best = _look(training, objective, clock, progress, best)
    _restore(parameters, best)
    training.seconds = clock.elapsed
    return training


class _Clock:
    """How far a training is, by steps or by time, and what a look at the held-out text costs."""

    def __init__(self, spec: DistillLogits) -> None:
        self._started = time.monotonic()
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


def _look(
    training: Training, objective: Objective, clock: _Clock, progress: Progress, best: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Measure held-out loss, and return the state that is the best so far."""
    started = clock.elapsed
    loss = objective.held_out_loss(
        lambda: progress(clock.share(training.steps), f"held-out loss after step {training.steps}")
    )
    clock.look_seconds = clock.elapsed - started
    if not best and not math.isfinite(loss):
        raise JobFailed(
            "The student's outputs are not finite before it was trained.",
            code="student_is_broken",
            hint="Look at the step before, or at the uploaded student: its weights hold NaN or infinity.",
        )
    is_best = not best or loss < training.best
    training.held_out.append((float(training.steps), loss))
    if not is_best:
        return best
    return {name: parameter.detach().clone() for name, parameter in objective.student.named_parameters()}


def _restore(parameters: dict[str, nn.Parameter], best: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])


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
    return (
        f"step {training.steps} of {spec.max_steps}, loss {training.losses[-1][1]:.4f}, "
        f"{training.tokens / clock.elapsed:.0f} tokens/s, {clock.elapsed * (1 - share) / share:.0f} s left"
    )
