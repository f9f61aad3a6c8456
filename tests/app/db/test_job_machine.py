"""The life of jobs as a model in a few lines, and the SQL held to it through every order of events that hypothesis thinks of.

Workers die, wake up late and go on with a lease they lost; people cancel, retry and delete at any moment. More of it:
`make fuzz`.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select, update

from app.access import DEFAULT_TENANT
from app.db import job_claims, job_moves, job_queries
from app.db.engine import Database
from app.db.job_claims import Claim
from app.db.tables import Job, JobEvent, JobStage

EXAMPLES = int(os.environ.get("MODELPRESS_FUZZ_EXAMPLES", "0")) // 20 or 25
STAGES = ("load", "work", "report")
MAX_ATTEMPTS = 2
ERROR = {"code": "x", "detail": "y"}
ENDED = {"succeeded", "failed", "cancelled"}


@dataclass
class Expected:
    """What a job should be."""

    status: str = "queued"
    fence: int = 0
    attempt: int = 0
    stage: int = 0
    cancel: bool = False
    lease_holds: bool = False
    told: list[str] = field(default_factory=lambda: ["queued"])
    """Statuses that its events tell of."""

    def holds(self, claim: Claim) -> bool:
        return self.status == "running" and self.fence == claim.fence

    def leaves(self, *, fails: bool) -> str:
        """What it becomes when its worker leaves it."""
        self.status = "cancelled" if self.cancel else "failed" if fails else "queued"
        self.lease_holds = False
        self.told.append(self.status)
        return self.status


some_job = precondition(lambda self: self.expected)
some_claim = precondition(lambda self: self.claims)


class JobMachine(RuleBasedStateMachine):
    """Everybody who moves jobs, one after the other."""

    database: Database
    made = itertools.count(1)

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, Expected] = {}
        self.claims: list[Claim] = []
        """The last that were given out, those that no longer count among them."""

    @initialize()
    def begin(self) -> None:
        with self.database.write() as session:
            session.execute(delete(Job))

    @precondition(lambda self: sum(job.status not in ENDED for job in self.expected.values()) < 2)
    @rule()
    def create(self) -> None:
        job_id = f"job_{next(self.made):06d}"
        job = Job(
            id=job_id, tenant_id=DEFAULT_TENANT, model_id="m", model_name="m", spec={}, technique="t", labels={"a": "b"},
            queue="cpu", max_attempts=MAX_ATTEMPTS, warnings=[],
        )  # fmt: skip
        with self.database.write() as session:
            job_moves.create_job(session, job, STAGES)
        self.expected[job_id] = Expected()

    @some_job
    @rule(data=st.data())
    def a_worker_comes(self, data: st.DataObject) -> None:
        queued = [job_id for job_id, job in self.expected.items() if job.status == "queued"]
        self.claim(data.draw(st.sampled_from(sorted(queued or self.expected))))

    @some_claim
    @rule(
        data=st.data(),
        act=st.sampled_from(["heartbeat", "succeed", "fail", "give_back", "release", "end_cancelled"]),
    )
    def a_worker_acts(self, data: st.DataObject, act: str) -> None:
        """One that holds its job, or did."""
        getattr(self, act)(self._drawn_claim(data))

    @some_claim
    @rule(data=st.data(), act=st.sampled_from(["work", "rewind"]), stage=st.integers(0, len(STAGES) - 1))
    def a_stage_moves(self, data: st.DataObject, act: str, stage: int) -> None:
        getattr(self, act)(self._drawn_claim(data), stage)

    @some_job
    @rule(data=st.data(), act=st.sampled_from(["cancel", "retry", "delete", "let_lease_end"]))
    def something_happens(self, data: st.DataObject, act: str) -> None:
        getattr(self, act)(data.draw(st.sampled_from(sorted(self.expected))))

    @rule(act=st.sampled_from(["sweep", "dispatch"]))
    def the_sweeper_comes(self, act: str) -> None:
        getattr(self, act)()

    def claim(self, job_id: str) -> None:
        with self.database.write() as session:
            claim = job_claims.claim_job(session, job_id, owner="w", lease_seconds=3600)
        job = self.expected[job_id]
        lost = job.status == "running" and not job.lease_holds
        if job.cancel or job.attempt >= MAX_ATTEMPTS or not (job.status == "queued" or lost):
            assert claim is None
            return
        job.status, job.lease_holds = "running", True
        job.fence, job.attempt = job.fence + 1, job.attempt + 1
        job.told.append("running")
        assert claim == Claim(job_id, job.fence, job.stage, job.attempt, None)
        self.claims = [*self.claims[-2:], claim]

    def heartbeat(self, claim: Claim) -> None:
        with self.database.write() as session:
            asked = job_claims.extend_lease(session, claim, lease_seconds=3600)
        job = self._held(claim)
        assert asked is (None if job is None else job.cancel)
        if job is not None:
            job.lease_holds = True

    def work(self, claim: Claim, number: int) -> None:
        with self.database.write() as session:
            started = job_claims.start_stage(session, claim, number)
            done = job_claims.commit_stage(session, claim, number, f"stages/{number}-{claim.fence}", {})
        job = self._held(claim)
        assert started is done is (job is not None and job.stage == number)
        if job is not None and done:
            job.stage += 1

    def rewind(self, claim: Claim, stage: int) -> None:
        job = self._held(claim)
        if job is not None and stage > job.stage:
            return
        with self.database.write() as session:
            assert job_claims.rewind_stages(session, claim, stage) is (job is not None)
        if job is not None:
            job.stage = stage

    def succeed(self, claim: Claim) -> None:
        with self.database.write() as session:
            ended = job_claims.succeed(session, claim, verdict="accepted", artifacts=[])
        job = self._held(claim)
        assert ended is (job is not None and not job.cancel)
        if job is not None and ended:
            job.status = "succeeded"
            job.told.append("succeeded")

    def fail(self, claim: Claim) -> None:
        with self.database.write() as session:
            ended = job_claims.fail(session, claim, ERROR)
        job = self._held(claim)
        assert ended is (job is not None)
        if job is not None:
            job.status = "failed"
            job.told.append("failed")

    def give_back(self, claim: Claim) -> None:
        with self.database.write() as session:
            status = job_claims.give_back(session, claim, ERROR, delay_seconds=-1)
        job = self._held(claim)
        assert status == (None if job is None else job.leaves(fails=job.attempt >= MAX_ATTEMPTS))

    def release(self, claim: Claim) -> None:
        with self.database.write() as session:
            status = job_claims.release(session, claim)
        job = self._held(claim)
        assert status == (None if job is None else job.leaves(fails=False))
        if job is not None:
            job.attempt -= 1

    def end_cancelled(self, claim: Claim) -> None:
        """As a supervisor does, which asks first."""
        job = self._held(claim)
        if job is not None and not job.cancel:
            return
        with self.database.write() as session:
            assert job_claims.end_cancelled(session, claim) is (job is not None)
        if job is not None:
            job.status = "cancelled"
            job.told.append("cancelled")

    def cancel(self, job_id: str) -> None:
        job = self.expected[job_id]
        if job.cancel:
            return
        with self.database.write() as session:
            status = job_moves.request_cancel(session, job_id)
        if job.status in ENDED:
            assert status is None
            return
        job.cancel = True
        assert status == ("cancelled" if job.status == "queued" else "cancelling")
        job.told.append(str(status))
        if job.status == "queued":
            job.status = "cancelled"

    def retry(self, job_id: str) -> None:
        with self.database.write() as session:
            retried = job_moves.retry_job(session, job_id)
        job = self.expected[job_id]
        assert retried is (job.status in {"failed", "cancelled"})
        if retried:
            job.status, job.attempt, job.cancel = "queued", 0, False
            job.told.append("queued")

    def delete(self, job_id: str) -> None:
        with self.database.write() as session:
            gone = job_moves.delete_job(session, job_id)
        assert gone is (self.expected[job_id].status in ENDED)
        if gone:
            del self.expected[job_id]

    def let_lease_end(self, job_id: str) -> None:
        """Its worker died, or is only asleep and will go on with its claim."""
        with self.database.write() as session:
            session.execute(
                update(Job).where(Job.id == job_id, Job.status == "running").values(lease_until=0.0)
            )
        self.expected[job_id].lease_holds = False

    def sweep(self) -> None:
        lost = {
            job_id: job.leaves(fails=job.attempt >= MAX_ATTEMPTS)
            for job_id, job in self.expected.items()
            if job.status == "running" and not job.lease_holds
        }
        with self.database.write() as session:
            assert {swept.job_id: swept.status for swept in job_moves.sweep_lost(session)} == lost

    def dispatch(self) -> None:
        """Whatever waits has a message, or is given one."""
        with self.database.write() as session:
            job_moves.take_undispatched(session, stale_seconds=3600)
        with self.database.read() as session:
            waiting = select(Job.id).where(Job.status == "queued", Job.dispatched_at.is_(None))
            assert session.scalars(waiting).all() == []

    @invariant()
    def rows_are_as_expected(self) -> None:
        with self.database.read() as session:
            rows = {row.id: row for row in session.scalars(select(Job))}
            stages = job_queries.stages_of(session, list(rows))
            events = list(
                session.execute(select(JobEvent.job_id, JobEvent.number, JobEvent.type, JobEvent.data))
            )
            kept = set(session.scalars(select(JobStage.job_id)))
        assert rows.keys() == self.expected.keys() == kept
        for job_id, job in self.expected.items():
            row = rows[job_id]
            assert (row.status, row.fence, row.attempt, row.stage) == (
                job.status, job.fence, job.attempt, job.stage,
            )  # fmt: skip
            assert row.cancel_requested is job.cancel
            assert (row.ended_at is not None) is (job.status in ENDED)
            assert (row.lease_owner is not None) is (job.status == "running")
            assert not (job.status == "queued" and job.cancel), "nobody could ever claim it"
            assert [s.status == "done" for s in stages[job_id]][: job.stage] == [True] * job.stage
            own = sorted((e.number, e.type, e.data) for e in events if e.job_id == job_id)
            assert [number for number, _, _ in own] == list(range(1, row.event_count + 1))
            assert [data["status"] for _, kind, data in own if kind == "status"] == job.told

    def _drawn_claim(self, data: st.DataObject) -> Claim:
        """Most often one that holds."""
        held = [claim for claim in self.claims if self._held(claim) is not None]
        late = not held or data.draw(st.integers(0, 4)) == 0
        return data.draw(st.sampled_from(self.claims if late else held))

    def _held(self, claim: Claim) -> Expected | None:
        """The job of a claim that still counts."""
        job = self.expected.get(claim.job_id)
        return job if job is not None and job.holds(claim) else None


def test_jobs_live_as_the_model_says(any_database: Database) -> None:
    run(any_database, tuple(Phase), EXAMPLES)


def run(database: Database, phases: tuple[Phase, ...], examples: int) -> None:
    machine = type("Machine", (JobMachine,), {"database": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=phases, report_multiple_bugs=False,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("mutation", ["claim of a cancelled job", "lost lease"])
def test_the_model_notices_what_is_wrong(
    database: Database, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    """A test of the test: two faults that there have been, or might be."""
    if mutation == "lost lease":
        monkeypatch.setattr(job_claims, "_held", lambda claim: (Job.id == claim.job_id,))
    else:
        released = {"status": "queued", "lease_owner": None, "lease_until": None, "dispatched_at": None}
        monkeypatch.setattr(job_claims, "without_worker", lambda **_: released)
    with pytest.raises(AssertionError):
        run(database, (Phase.generate,), 200)
