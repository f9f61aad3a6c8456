"""The training loop: AdamW, warm-up and cosine, a look at held-out data now and then, the best state kept.

It knows nothing of models, texts and images: an objective gives a differentiable loss per batch and the loss on held-out data.
A training that was killed goes on from its last snapshot, to the same losses (with `max_seconds`, whose clock the
learning rate follows, to nearly the same).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from app.errors import JobFailed
from workers.engine.distill.record import Training
from workers.engine.distill.snapshots import Snapshots
from workers.engine.technique import Progress, never

WARM_UP = 0.05
# What a gate's gradient is compared with: its penalty is shared by all weights, a hundred million of them.
_GATE_EPSILON = 1e-16
FINAL_RATE = 0.1
_CLIP_NORM = 1.0


class Batch(Protocol):
    """What is learned from at once."""

    @property
    def amount(self) -> int:
        """Tokens or images."""


Masks = Iterable[tuple[nn.Parameter, Tensor]]

B = TypeVar("B", bound=Batch)
B_contra = TypeVar("B_contra", bound=Batch, contravariant=True)


class Objective(Protocol[B_contra]):
    """What is to become small."""

    unit: str
    """What batches are made of: `tokens` or `images`."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the student's parameters under its own names, and those that only the loss needs."""

    def statistics(self) -> dict[str, Tensor]:
        """What else training changes: the running statistics of batch norms."""

    def loss(self, batch: B_contra, /) -> Tensor:
        """Mean loss of one batch, differentiable by the parameters."""

    def held_out_loss(self, tick: Callable[[], None]) -> float:
        """Mean loss on data that is never trained on; calls `tick` every few seconds."""


class Schedule(Protocol):
    """The part of a spec that says how long to train, and how fast."""

    @property
    def learning_rate(self) -> float:
        """At the peak."""

    @property
    def max_steps(self) -> int:
        """Steps at most."""

    @property
    def max_seconds(self) -> float | None:
        """Seconds at most."""

    @property
    def evaluate_every(self) -> int:
        """Steps between looks at the held-out loss."""

    @property
    def patience(self) -> int:
        """Looks without a better loss before training stops."""


class Pruning(Protocol):
    """What prunes while the loop trains."""

    @property
    def settled(self) -> int:
        """The step from which on nothing more is pruned by schedule: the best state is one after it."""

    @property
    def gate_rate(self) -> float:
        """Learning rate of the gates, at the peak."""

    def gates(self) -> dict[str, nn.Parameter]:
        """What is trained beside the objective's parameters, to prune them."""

    def statistics(self) -> dict[str, Tensor]:
        """What else changes: masks and scores."""

    def before_step(self, step: int) -> Masks:
        """Called before the step of that number, from 1; nothing else may decide what it does.

        Returns parameters whose masks changed, with the masks: what is False has no gradient, and is to keep its value.
        """

    def penalty(self) -> Tensor:
        """What is added to the loss, on training and on held-out data."""


class NoPruning:
    """Parameters are trained, and that is all."""

    settled = 0
    gate_rate = 0.0

    def gates(self) -> dict[str, nn.Parameter]:
        """None."""
        return {}

    def statistics(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def before_step(self, step: int) -> Masks:  # noqa: ARG002 - see `Pruning`
        """Do nothing."""
        return ()

    def penalty(self) -> Tensor:
        """Zero."""
        return torch.zeros(())


def learning_rate_factor(share: float) -> float:
    """Share of the peak rate at a share of the training, both 0 to 1: linear warm-up, then cosine to a tenth."""
    if share < WARM_UP:
        return share / WARM_UP
    cosine = 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))
    return FINAL_RATE + (1 - FINAL_RATE) * cosine


def train(  # noqa: PLR0913 - what is trained, how, and what becomes of it
    objective: Objective[B],
    batches: Iterator[B],
    spec: Schedule,
    *,
    batches_a_step: int = 1,
    zeros: Mapping[str, Tensor],
    snapshots: Snapshots,
    progress: Progress,
    pruning: Pruning | None = None,
    is_stopped: Callable[[], bool] = never,
) -> Training:
    """Train until the steps or the seconds are used up, held-out loss no longer falls, or it is stopped; leave the best state.

    `zeros` holds a mask for each parameter whose zeros must stay: True where it may change.
    Raises JobFailed when there is no state to leave: outputs were not finite before training, or never since pruning.
    """
    run = _Run(objective, spec, batches_a_step, snapshots, progress, pruning or NoPruning())
    training = run.training
    batches = islice(batches, training.steps * batches_a_step, None)
    if not training.held_out:
        run.look()
    while (reason := _reason_to_stop(training, spec, run.clock, is_stopped)) is None:
        run.step(batches)
        _hold_zeros(run.parameters, zeros)
        if training.steps % spec.evaluate_every == 0:
            run.look()
            run.save()
    training.stopped_by = reason
    if training.held_out[-1][0] != training.steps:
        run.look()
    if not math.isfinite(training.best):
        raise JobFailed(
            "Training diverged: the held-out loss is not finite any more.",
            code="training_diverged",
            hint="Ask for a smaller learning_rate.",
        )
    snapshots.restore_best(run.state)
    training.seconds = run.clock.elapsed
    return training


class _Run(Generic[B]):
    """A training under way: its parameters, its optimizer, and what has become of it so far."""

    def __init__(
        self,
        objective: Objective[B],
        spec: Schedule,
        batches_a_step: int,
        snapshots: Snapshots,
        progress: Progress,
        pruning: Pruning,
    ) -> None:
        self.objective, self.spec, self.snapshots, self.progress = objective, spec, snapshots, progress
        self.batches_a_step, self.pruning = batches_a_step, pruning
        gates = pruning.gates()
        self.parameters = objective.parameters()
        groups: list[dict[str, Any]] = [
            {"params": list(self.parameters.values()), "rate": spec.learning_rate}
        ]
        if gates:
            groups.append({"params": list(gates.values()), "rate": pruning.gate_rate, "eps": _GATE_EPSILON})
        self.state: dict[str, Tensor] = {
            **self.parameters, **gates, **objective.statistics(), **pruning.statistics()
        }  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.training = Training.of(snapshots.restore(self.state, self.optimizer), settled=pruning.settled)
        self.clock = _Clock(spec, self.training.seconds)

    def step(self, batches: Iterator[B]) -> None:
        """Add up the gradients of as many batches as a step has, and move once."""
        training = self.training
        for parameter, mask in self.pruning.before_step(training.steps + 1):
            # Momentum would carry what is masked on for some twenty steps.
            if parameter in self.optimizer.state:
                self.optimizer.state[parameter]["exp_avg"].mul_(mask)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate_factor(self.clock.share(training.steps + 1))
        total = 0.0
        for batch in islice(batches, self.batches_a_step):
            loss = (self.objective.loss(batch) + self.pruning.penalty()) / self.batches_a_step
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            training.amount += batch.amount
            self.progress(self.clock.share(training.steps), self._message())
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        training.steps += 1
        training.losses.append((float(training.steps), total))
        self.progress(self.clock.share(training.steps), self._message())

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
        loss += float(self.pruning.penalty().detach())
        # What is still to be pruned stands for nothing but itself: the last state of it is kept.
        is_best = training.steps < training.settled or not training.counted or loss < training.best
        training.held_out.append((float(training.steps), loss))
        if is_best:
            self.snapshots.keep_best(training.steps, self.state)

    def save(self) -> None:
        """Note where the training is, for it to go on there."""
        self.training.seconds = self.clock.elapsed
        self.snapshots.save(self.training.steps, self.state, self.optimizer, asdict(self.training))

    def _message(self) -> str:
        training, clock = self.training, self.clock
        share = clock.share(training.steps)
        loss = f"loss {training.losses[-1][1]:.4f}, " if training.losses else ""
        left = f", {clock.elapsed * (1 - share) / share:.0f} s left" if share else ""
        return (
            f"step {training.steps} of {self.spec.max_steps}, {loss}held-out {training.held_out[-1][1]:.4f}, "
            f"{training.amount / clock.elapsed:.0f} {self.objective.unit}/s{left}"
        )


class _Clock:
    """How far a training is, by steps or by time, and what a look at the held-out data costs."""

    def __init__(self, spec: Schedule, spent: float) -> None:
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


def _reason_to_stop(
    training: Training, spec: Schedule, clock: _Clock, is_stopped: Callable[[], bool]
) -> str | None:
    if training.steps >= spec.max_steps:
        return "max_steps"
    # One step at least: a student that was never trained says nothing about the settings.
    if training.steps > 0 and clock.is_up():
        return "max_seconds"
    if training.steps > 0 and is_stopped():
        return "request"
    losses = training.counted
    looks_without = len(losses) - 1 - losses.index(training.best) if training.best in losses else len(losses)
    return "patience" if looks_without >= spec.patience else None
