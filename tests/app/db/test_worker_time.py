"""The ledger of workers' time is right at any time, however a claim ends."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from job_support import claim
from sqlalchemy import insert, text, update
from sqlalchemy.orm import Session

from app.db import job_claims, job_moves, worker_time
from app.db.engine import Database
from app.db.job_claims import Claim
from app.db.tables import Job, Tenant, WorkerTime
from app.ids import new_id

MOVES: dict[str, Callable[[Session, Claim], object]] = {
    "heartbeat": lambda s, c: job_claims.extend_lease(s, c, lease_seconds=60),
    "succeed": lambda s, c: job_claims.succeed(s, c, verdict="accepted", artifacts=[]),
    "fail": lambda s, c: job_claims.fail(s, c, {"code": "x", "detail": "x"}),
    "give_back": lambda s, c: job_claims.give_back(s, c, {"code": "x", "detail": "x"}, delay_seconds=0),
    "release": job_claims.release,
    "end_cancelled": job_claims.end_cancelled,
}


def add_job(database: Database, tenant: str = "default") -> str:
    job = Job(
        id=new_id("job"), tenant_id=tenant, model_id="mdl_1", model_name="m", spec={}, technique="t", queue="cpu",
        max_attempts=3,
    )  # fmt: skip
    with database.write() as session:
        job_moves.create_job(session, job, ["load"])
    return job.id


def claimed(database: Database, seconds_ago: float) -> Claim:
    """A job that a worker took so long ago, and has not been heard of since."""
    taken = claim(database, add_job(database))
    with database.write() as session:
        moved = {
            "started_at": WorkerTime.started_at - seconds_ago,
            "held_until": WorkerTime.held_until - seconds_ago,
        }
        session.execute(update(WorkerTime).where(WorkerTime.job_id == taken.job_id).values(moved))
    return taken


def used(database: Database, since: float = 0.0, tenant: str = "default") -> float:
    with database.for_tenant(tenant).read() as session:
        return float(session.execute(worker_time.used_since(since)).scalar_one())


def expire_lease(database: Database, job_id: str) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=0.0))


def test_a_claim_counts_until_its_last_heartbeat_or_its_end(any_database: Database) -> None:
    for name, move in MOVES.items():
        before = used(any_database)
        taken = claimed(any_database, seconds_ago=100)
        assert used(any_database) - before == pytest.approx(0, abs=1e-3), name
        with any_database.write() as session:
            assert move(session, taken) is not None, name
        assert used(any_database) - before == pytest.approx(100, abs=5), name


def test_of_a_lost_worker_nothing_counts_after_its_last_heartbeat(any_database: Database) -> None:
    swept, taken_over = claimed(any_database, seconds_ago=100), claimed(any_database, seconds_ago=100)
    for lost in (swept, taken_over):
        expire_lease(any_database, lost.job_id)
    with any_database.write() as session:
        job = job_claims.claim_job(session, taken_over.job_id, owner="another", lease_seconds=60)
        assert job is not None
        assert [swept.job_id] == [s.job_id for s in job_moves.sweep_lost(session)]
    with any_database.write() as session:
        for lost in (swept, taken_over):
            assert job_claims.extend_lease(session, lost, lease_seconds=60) is None
            assert job_claims.succeed(session, lost, verdict="accepted", artifacts=[]) is False
    assert used(any_database) == pytest.approx(0, abs=5)


def test_every_try_of_a_job_counts_and_stays_when_the_job_is_deleted(any_database: Database) -> None:
    first = claimed(any_database, seconds_ago=100)
    with any_database.write() as session:
        job_claims.give_back(session, first, {"code": "x", "detail": "x"}, delay_seconds=0)
    with any_database.write() as session:
        session.execute(update(Job).values(run_after=None))
        past = {"started_at": WorkerTime.started_at - 1000, "held_until": WorkerTime.held_until - 1000}
        session.execute(update(WorkerTime).values(past))
    second = claim(any_database, first.job_id)
    with any_database.write() as session:
        started = {"started_at": WorkerTime.started_at - 50}
        session.execute(update(WorkerTime).where(WorkerTime.fence == second.fence).values(started))
        job_claims.fail(session, second, {"code": "x", "detail": "x"})
    with any_database.write() as session:
        assert job_moves.delete_job(session, first.job_id)
    assert used(any_database) == pytest.approx(150, abs=5)


def test_of_a_claim_over_the_turn_of_the_month_the_part_since_counts(any_database: Database) -> None:
    month = worker_time.month_of(1_000_000_000)
    with any_database.write() as session:
        session.add(Tenant(id="acme"))
        session.flush()
        for number, (tenant, started_at, held_until) in enumerate(
            [
                ("default", month.start - 500, month.start - 100),
                ("default", month.start - 30, month.start + 70),
                ("default", month.start + 200, month.start + 205),
                ("acme", month.start + 200, month.start + 1200),
            ]
        ):
            row = {"job_id": f"job_{number}", "fence": 1, "tenant_id": tenant}
            session.execute(insert(WorkerTime).values(**row, started_at=started_at, held_until=held_until))
    assert used(any_database, month.start) == 75
    assert used(any_database, month.start, "acme") == 1000


@pytest.mark.parametrize(
    ("now", "start", "end"),
    [
        ("2026-11-27T19:00:00", "2026-11-01", "2026-12-01"),
        ("2026-12-31T23:59:59", "2026-12-01", "2027-01-01"),
        ("2028-02-01T00:00:00", "2028-02-01", "2028-03-01"),
    ],
)
def test_months_are_of_the_calendar_in_utc(now: str, start: str, end: str) -> None:
    now_, start_, end_ = (
        datetime.fromisoformat(t).replace(tzinfo=UTC).timestamp() for t in (now, start, end)
    )
    assert worker_time.month_of(now_) == worker_time.Month(start_, end_)


def test_a_months_seconds_are_summed_by_index_among_many(any_database: Database) -> None:
    with any_database.write() as session:
        rows = [
            {"job_id": f"{n}", "fence": 1, "tenant_id": "default", "started_at": n, "held_until": n + 1.0}
            for n in range(5000)
        ]
        session.execute(insert(WorkerTime), rows)
        compiled = worker_time.used_since(4900.0).where(WorkerTime.tenant_id == "default")
        explain = "EXPLAIN QUERY PLAN "
        if any_database.engine.dialect.name == "postgresql":
            session.execute(text("ANALYZE worker_time"))
            explain = "EXPLAIN "
        sql = str(compiled.compile(any_database.engine, compile_kwargs={"literal_binds": True}))
        plan = "\n".join(str(row[-1]) for row in session.execute(text(explain + sql)))
    assert "ix_worker_time_sum" in plan, plan
