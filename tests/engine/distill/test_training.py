from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.spec.distill import DistillLogits
from workers.engine.distill.texts import Batch
from workers.engine.distill.training import Training, learning_rate_factor, train


class _ToZero:
    """Make a vector of ones zero; `held_out` overrides what a look sees."""

    def __init__(self, held_out: Callable[[int], float] | None = None) -> None:
        self.student = nn.Linear(4, 1, bias=False)
        nn.init.ones_(self.student.weight)
        self._held_out = held_out
        self.looks = 0

    def loss(self, batch: Batch) -> Tensor:
        return (self.student.weight**2).sum()

    def held_out_loss(self, tick: Callable[[], None]) -> float:
        tick()
        self.looks += 1
        if self._held_out is not None:
            return self._held_out(self.looks)
        return float(self.loss(_batch()).detach())


def _batch() -> Batch:
    return Batch(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))


def _batches() -> Iterator[Batch]:
    while True:
        yield _batch()


def _train(objective: _ToZero, **spec: float) -> Training:
    settings = DistillLogits(**({"max_steps": 40, "evaluate_every": 5, "learning_rate": 0.05} | spec))
    return train(objective, _batches(), settings, zeros={}, progress=lambda share, message: None)


def test_rate_warms_up_over_a_twentieth_and_falls_to_a_tenth() -> None:
    assert learning_rate_factor(0.025) == pytest.approx(0.5)
    assert learning_rate_factor(0.05) == pytest.approx(1.0)
    assert learning_rate_factor(0.525) == pytest.approx(0.55)
    assert learning_rate_factor(1.0) == pytest.approx(0.1)


def test_loss_falls_and_every_step_and_look_is_on_record() -> None:
    training = _train(_ToZero())
    assert training.stopped_by == "max_steps"
    assert [step for step, _ in training.losses] == list(range(1, 41))
    assert [step for step, _ in training.held_out] == list(range(0, 41, 5))
    assert training.improved
    assert training.best < 0.5 * training.held_out[0][1]
    assert training.tokens == 40 * 6


def test_the_state_of_the_best_look_is_what_remains() -> None:
    objective = _ToZero(lambda look: {1: 3.0, 2: 1.0}.get(look, 2.0 + look))
    seen: list[Tensor] = []
    settings = DistillLogits(max_steps=40, evaluate_every=5, learning_rate=0.05, patience=3)

    def progress(share: float, message: str) -> None:
        if message.startswith("held-out loss after step 5"):
            seen.append(objective.student.weight.detach().clone())

    training = train(objective, _batches(), settings, zeros={}, progress=progress)
    assert training.stopped_by == "patience"
    assert training.steps == 20
    assert torch.equal(objective.student.weight, seen[0])


def test_a_student_that_never_improves_is_as_it_was() -> None:
    objective = _ToZero(float)
    training = _train(objective, patience=2)
    assert not training.improved
    assert torch.equal(objective.student.weight, torch.ones(1, 4))


def test_a_diverged_student_is_never_the_best() -> None:
    objective = _ToZero(lambda look: 1.0 if look == 1 else math.nan)
    training = _train(objective, patience=2)
    assert training.stopped_by == "patience"
    assert training.best == 1.0
    assert torch.equal(objective.student.weight, torch.ones(1, 4))


def test_time_ends_training_after_a_step_at_least() -> None:
    training = _train(_ToZero(), max_seconds=1e-6)
    assert training.stopped_by == "max_seconds"
    assert training.steps == 1
    assert len(training.held_out) == 2


def test_masked_zeros_stay() -> None:
    objective = _ToZero()
    mask = torch.tensor([[True, False, True, False]])
    with torch.no_grad():
        objective.student.weight.mul_(mask)
    settings = DistillLogits(max_steps=5, evaluate_every=5, learning_rate=0.05)
    objective.loss = lambda batch: ((objective.student.weight - 3) ** 2).sum()  # type: ignore[method-assign]
    train(objective, _batches(), settings, zeros={"weight": mask}, progress=lambda share, message: None)
    assert torch.equal(objective.student.weight == 0, ~mask)


def test_an_exception_from_progress_ends_training() -> None:
    def cancel(share: float, message: str) -> None:
        if message.startswith("step 3"):
            raise KeyboardInterrupt

    objective = _ToZero()
    settings = DistillLogits(max_steps=40, evaluate_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(objective, _batches(), settings, zeros={}, progress=cancel)


def test_a_student_that_is_broken_before_training_is_refused() -> None:
    with pytest.raises(JobFailed, match="not finite"):
        _train(_ToZero(lambda look: math.nan))
