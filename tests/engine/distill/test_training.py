from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.spec.distill import DistillLogits
from workers.engine.distill.record import Training
from workers.engine.distill.snapshots import Snapshots
from workers.engine.distill.texts import Batch
from workers.engine.distill.training import NoPruning, learning_rate_factor, train
from workers.engine.prune.gates import ScheduledGates
from workers.engine.technique import Progress


class _ToZero:
    """Make a vector of ones zero; `held_out` overrides what a look sees."""

    unit = "tokens"

    def __init__(self, held_out: Callable[[int], float] | None = None) -> None:
        self.student = nn.Linear(4, 1, bias=False)
        nn.init.ones_(self.student.weight)
        self._held_out = held_out
        self.looks = 0

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.student.named_parameters())

    def statistics(self) -> dict[str, Tensor]:
        return {}

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


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path)


def _train(objective: _ToZero, snapshots: Snapshots, **spec: float) -> Training:
    settings = DistillLogits(**({"max_steps": 40, "evaluate_every": 5, "learning_rate": 0.05} | spec))
    return _train_by(settings, objective, snapshots)


def _train_by(
    settings: DistillLogits,
    objective: _ToZero,
    snapshots: Snapshots,
    *,
    zeros: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda share, message: None,
) -> Training:
    return train(objective, _batches(), settings, zeros=zeros or {}, snapshots=snapshots, progress=progress)


def test_who_stops_it_gets_the_best_state_so_far(snapshots: Snapshots) -> None:
    objective = _ToZero()
    steps = itertools.count()
    training = train(
        objective,
        _batches(),
        DistillLogits(max_steps=40, evaluate_every=5, learning_rate=0.05),
        zeros={},
        snapshots=snapshots,
        progress=lambda share, message: None,
        is_stopped=lambda: next(steps) == 6,
    )
    assert (training.steps, training.stopped_by) == (7, "request")
    assert training.held_out[-1] == (7.0, training.best)
    assert objective.held_out_loss(lambda: None) == training.best < training.held_out[0][1]


def test_what_is_cut_keeps_its_value_although_it_was_moving(snapshots: Snapshots) -> None:
    objective = _ToZero()
    gates = ScheduledGates(objective.student, ["weight"], [(10, 0.5)], together=False)
    at_the_cut: list[Tensor] = []

    def look(share: float, message: str) -> None:
        if message.startswith("step 9 "):
            at_the_cut[:] = [objective.student.weight.detach().clone()]

    objective.loss = lambda batch: (objective.student(torch.eye(4) * torch.arange(1, 5)) ** 2).sum()  # type: ignore[method-assign]
    train(
        objective,
        _batches(),
        DistillLogits(max_steps=30, evaluate_every=30, learning_rate=0.05),
        zeros={},
        snapshots=snapshots,
        progress=look,
        pruning=gates,
    )
    weight, is_open = objective.student.weight.detach(), gates.open["weight"]
    assert torch.equal(weight[~is_open], at_the_cut[0][~is_open])
    assert (weight[is_open] < at_the_cut[0][is_open]).all()


def test_rate_warms_up_over_a_twentieth_and_falls_to_a_tenth() -> None:
    assert learning_rate_factor(0.025) == pytest.approx(0.5)
    assert learning_rate_factor(0.05) == pytest.approx(1.0)
    assert learning_rate_factor(0.525) == pytest.approx(0.55)
    assert learning_rate_factor(1.0) == pytest.approx(0.1)


def test_loss_falls_and_every_step_and_look_is_on_record(snapshots: Snapshots) -> None:
    training = _train(_ToZero(), snapshots)
    assert training.stopped_by == "max_steps"
    assert [step for step, _ in training.losses] == list(range(1, 41))
    assert [step for step, _ in training.held_out] == list(range(0, 41, 5))
    assert training.improved
    assert training.best < 0.5 * training.held_out[0][1]
    assert training.amount == 40 * 6


def test_the_state_of_the_best_look_is_what_remains(snapshots: Snapshots) -> None:
    objective = _ToZero(lambda look: {1: 3.0, 2: 1.0}.get(look, 2.0 + look))
    seen: list[Tensor] = []
    settings = DistillLogits(max_steps=40, evaluate_every=5, learning_rate=0.05, patience=3)

    def progress(share: float, message: str) -> None:
        if message.startswith("held-out loss after step 5"):
            seen.append(objective.student.weight.detach().clone())

    training = _train_by(settings, objective, snapshots, progress=progress)
    assert training.stopped_by == "patience"
    assert training.steps == 20
    assert torch.equal(objective.student.weight, seen[0])


def test_a_student_that_never_improves_is_as_it_was(snapshots: Snapshots) -> None:
    objective = _ToZero(float)
    training = _train(objective, snapshots, patience=2)
    assert not training.improved
    assert torch.equal(objective.student.weight, torch.ones(1, 4))


def test_a_diverged_student_is_never_the_best(snapshots: Snapshots) -> None:
    objective = _ToZero(lambda look: 1.0 if look == 1 else math.nan)
    training = _train(objective, snapshots, patience=2)
    assert training.stopped_by == "patience"
    assert training.best == 1.0
    assert torch.equal(objective.student.weight, torch.ones(1, 4))


def test_time_ends_training_after_a_step_at_least(snapshots: Snapshots) -> None:
    training = _train(_ToZero(), snapshots, max_seconds=1e-6)
    assert training.stopped_by == "max_seconds"
    assert training.steps == 1
    assert len(training.held_out) == 2


def test_masked_zeros_stay(snapshots: Snapshots) -> None:
    objective = _ToZero()
    mask = torch.tensor([[True, False, True, False]])
    with torch.no_grad():
        objective.student.weight.mul_(mask)
    settings = DistillLogits(max_steps=5, evaluate_every=5, learning_rate=0.05)
    objective.loss = lambda batch: ((objective.student.weight - 3) ** 2).sum()  # type: ignore[method-assign]
    _train_by(settings, objective, snapshots, zeros={"weight": mask})
    assert torch.equal(objective.student.weight == 0, ~mask)


def test_an_exception_from_progress_ends_training(snapshots: Snapshots) -> None:
    def cancel(share: float, message: str) -> None:
        if message.startswith("step 3"):
            raise KeyboardInterrupt

    objective = _ToZero()
    settings = DistillLogits(max_steps=40, evaluate_every=5)
    with pytest.raises(KeyboardInterrupt):
        _train_by(settings, objective, snapshots, progress=cancel)


def test_a_student_that_is_broken_before_training_is_refused(snapshots: Snapshots) -> None:
    with pytest.raises(JobFailed, match="not finite"):
        _train(_ToZero(lambda look: math.nan), snapshots)


class _ToBatch(_ToZero):
    """Make a vector of ones the first ids of each batch, which differ from batch to batch."""

    def loss(self, batch: Batch) -> Tensor:
        return ((self.student.weight - batch.ids[0, 0]) ** 2).mean()


def _numbered() -> Iterator[Batch]:
    for number in itertools.count():
        yield Batch(torch.full((2, 3), number % 7), torch.ones(2, 3, dtype=torch.long))


def test_a_training_that_was_stopped_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    settings = DistillLogits(max_steps=30, evaluate_every=5, learning_rate=0.05, patience=99)
    whole, resumed = _ToBatch(), _ToBatch()
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()

    def run(objective: _ToBatch, directory: str, progress: Progress) -> Training:
        kept = Snapshots(tmp_path / directory)
        return train(objective, _numbered(), settings, zeros={}, snapshots=kept, progress=progress)

    def stop(share: float, message: str) -> None:
        if message.startswith("step 18"):
            raise KeyboardInterrupt

    expected = run(whole, "whole", lambda share, message: None)
    with pytest.raises(KeyboardInterrupt):
        run(_ToBatch(), "stopped", stop)
    training = run(resumed, "stopped", lambda share, message: None)
    # From the first snapshot, not from the start: the looks before it are not taken again.
    assert 0 < resumed.looks < len(training.held_out)
    assert (training.losses, training.held_out) == (expected.losses, expected.held_out)
    assert torch.equal(resumed.student.weight, whole.student.weight)


def test_snapshots_are_as_rare_as_they_are_slow(snapshots: Snapshots, tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    snapshots.keep_best(0, {"weight": parameter})
    for step in range(3):
        snapshots.save(step, {"weight": parameter}, optimizer, {"steps": step})
    # The second and third came sooner than twenty times what the first one took.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000000", "record.json", "state-00000000",
    ]  # fmt: skip


def test_accumulated_batches_are_one_batch_to_the_optimizer(tmp_path: Path) -> None:
    losses = []
    for name, batches, times in (("together", [3.0], 1), ("apart", [1.0, 5.0], 2)):
        (tmp_path / name).mkdir()
        objective = _ToBatch()
        settings = DistillLogits(max_steps=1, learning_rate=0.05)
        source = iter([Batch(torch.full((2, 3), number), torch.ones(2, 3)) for number in batches])
        training = train(
            objective,
            source,
            settings,
            batches_a_step=times,
            zeros={},
            snapshots=Snapshots(tmp_path / name),
            progress=lambda share, message: None,
        )
        losses.append(objective.student.weight.detach().clone())
        assert training.steps == 1
        assert training.amount == 6 * times
    assert torch.equal(losses[0], losses[1])


class _Normed(_ToZero):
    """Its batch norm's statistics change with every batch that is learned from."""

    def __init__(self) -> None:
        super().__init__(lambda look: 1.0 + look)
        self.norm = nn.BatchNorm1d(4)

    def statistics(self) -> dict[str, Tensor]:
        return dict(self.norm.named_buffers())

    def loss(self, batch: Batch) -> Tensor:
        self.norm(torch.randn(8, 4) + 3)
        return super().loss(batch)


def test_statistics_of_batch_norms_belong_to_the_best_state(snapshots: Snapshots) -> None:
    objective = _Normed()
    _train(objective, snapshots, patience=1)
    assert torch.equal(objective.norm.running_mean, torch.zeros(4))
    assert int(objective.norm.num_batches_tracked) == 0


class _Settled(NoPruning):
    """Prunes until step 10."""

    settled = 10


def test_the_best_state_is_one_since_pruning_ended(snapshots: Snapshots) -> None:
    losses = {1: 0.1, 2: 0.2, 3: 3.0, 4: 1.0, 5: 2.0, 6: 2.5}
    objective = _ToZero(losses.__getitem__)
    settings = DistillLogits(max_steps=40, evaluate_every=5, learning_rate=0.05, patience=2)
    training = train(
        objective, _batches(), settings, zeros={}, snapshots=snapshots, progress=lambda *_: None, pruning=_Settled()
    )  # fmt: skip
    assert (training.best, training.steps) == (1.0, 25)
    assert not training.improved


def test_a_training_that_is_never_finite_since_pruning_ended_fails(snapshots: Snapshots) -> None:
    objective = _ToZero(lambda look: 1.0 if look == 1 else math.nan)
    settings = DistillLogits(max_steps=40, evaluate_every=5, learning_rate=0.05, patience=2)
    with pytest.raises(JobFailed, match="diverged"):
        train(
            objective, _batches(), settings, zeros={}, snapshots=snapshots, progress=lambda *_: None, pruning=_Settled()
        )  # fmt: skip


def test_of_the_best_states_between_two_snapshots_the_last_alone_stays_beside_the_recorded_one(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    state = {"weight": torch.zeros(3)}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    snapshots.keep_best(1, state)
    snapshots.save(1, state, optimizer, {})
    for step in (2, 3, 4):
        state["weight"] += 1
        snapshots.keep_best(step, state)
        assert {path.name for path in tmp_path.glob("best-*")} == {"best-00000001", f"best-{step:08d}"}
    snapshots.restore_best(read := {"weight": torch.zeros(3)})
    assert read["weight"].tolist() == [3, 3, 3]
