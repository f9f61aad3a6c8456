"""Workers are shared evenly between tenants, whoever has how many jobs; each tenant's own go by urgency and age."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, insert, select, text, update

from app.db import job_claims, job_moves, job_turns, worker_queries
from app.db.engine import Database, db_now
from app.db.job_claims import Claim
from app.db.quota_queries import Limits
from app.db.tables import Job, Tenant, WorkerTime
from app.services.quotas import set_limits

Queue = Callable[..., list[str]]


@pytest.fixture
def queue(any_database: Database) -> Queue:
    """Call with a tenant and a number for the ids of so many waiting jobs, oldest first."""
    made = 0

    def add(tenant: str, number: int, **values: object) -> list[str]:
        nonlocal made
        with any_database.write() as session:
            if session.get(Tenant, tenant) is None:
                session.add(Tenant(id=tenant))
                session.flush()
            rows = [
                {
                    "id": f"job_{made + place:06d}", "tenant_id": tenant, "model_id": "m", "model_name": "m", "spec": {},
                    "technique": "t", "queue": "cpu", "max_attempts": 3, "queued_at": float(made + place), **values,
                }
                for place in range(number)
            ]  # fmt: skip
            session.execute(insert(Job), rows)
            made += number
        return [str(row["id"]) for row in rows]

    return add


def limit(database: Database, tenant: str, running_jobs: int) -> None:
    with database.write() as session:
        set_limits(session, tenant, Limits(None, None, running_jobs))


def take(database: Database, hint: str) -> Claim | None:
    with database.write() as session:
        return job_turns.claim_next(session, hint, owner="w", lease_seconds=60)


def taken(database: Database, hint: str, times: int) -> list[str | None]:
    return [claim and claim.job_id for claim in (take(database, hint) for _ in range(times))]


def end(database: Database, job_id: str | None) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(status="succeeded"))


def test_a_tenant_with_many_jobs_delays_anothers_first_by_one(any_database: Database, queue: Queue) -> None:
    many = queue("acme", 50)
    few = queue("umbrella", 2)
    assert taken(any_database, many[0], 5) == [many[0], few[0], many[1], few[1], many[2]]


def test_with_one_worker_tenants_take_turns(any_database: Database, queue: Queue) -> None:
    first, second = queue("acme", 3), queue("umbrella", 3)
    order = []
    for _ in range(6):
        claim = take(any_database, first[0])
        assert claim is not None
        end(any_database, claim.job_id)
        order.append(claim.job_id)
    assert order == [first[0], second[0], first[1], second[1], first[2], second[2]]


def test_of_a_tenants_jobs_the_urgent_come_first_then_the_old(any_database: Database, queue: Queue) -> None:
    low, normal, high = queue("acme", 1, priority=2), queue("acme", 2), queue("acme", 1, priority=0)
    assert taken(any_database, low[0], 5) == [*high, *normal, *low, None]


def test_a_message_starts_jobs_of_its_own_queue_that_are_due(any_database: Database, queue: Queue) -> None:
    gpu = queue("acme", 1, queue="gpu")
    queue("acme", 1, cancel_requested=True)
    queue("acme", 1, run_after=4e9)
    cpu = queue("acme", 1)
    assert taken(any_database, cpu[0], 2) == [*cpu, None]
    assert taken(any_database, gpu[0], 2) == [*gpu, None]
    assert take(any_database, "job_never") is None


def test_a_job_whose_worker_is_gone_is_taken_over_by_its_message(
    any_database: Database, queue: Queue
) -> None:
    (job,) = queue("acme", 1)
    with any_database.write() as session:
        assert job_claims.claim_job(session, job, owner="dead", lease_seconds=-1)
    assert taken(any_database, job, 2) == [job, None]


def test_a_worker_leaves_what_needs_more_memory_to_a_larger_one(any_database: Database, queue: Queue) -> None:
    large, small, any_size = (
        queue("acme", 1, memory_bytes=300) + queue("acme", 1, memory_bytes=100) + queue("acme", 1)
    )
    with any_database.write() as session:
        job_moves.take_undispatched(session, stale_seconds=60)

    def take_with(memory_bytes: int, hint: str) -> str | None:
        with any_database.write() as session:
            claim = job_turns.claim_next(
                session, hint, owner="w", lease_seconds=60, memory_bytes=memory_bytes
            )
        return claim and claim.job_id

    assert [take_with(299, large) for _ in range(3)] == [small, any_size, None]
    with any_database.write() as session:
        assert [job for job, _ in job_moves.take_undispatched(session, stale_seconds=60)] == [large]
        assert not worker_queries.a_job_waits(
            session, ["cpu"], memory_bytes=299, for_seconds=1, sent_within_seconds=60
        )
        assert worker_queries.a_job_waits(
            session, ["cpu"], memory_bytes=300, for_seconds=1, sent_within_seconds=60
        )
    assert take_with(300, large) == large
    with any_database.write() as session:
        session.execute(update(Job).where(Job.id == large).values(lease_until=0.0))
    assert [take_with(299, large), take_with(300, large)] == [None, large]


def test_workers_that_ask_at_once_get_different_jobs_and_leave_none(
    any_database: Database, queue: Queue
) -> None:
    jobs = queue("acme", 6) + queue("umbrella", 6)
    with ThreadPoolExecutor(6) as pool:
        claims = list(pool.map(lambda job: take(any_database, job), jobs))
    assert sorted(claim.job_id for claim in claims if claim) == jobs
    assert {claim.fence for claim in claims if claim} == {1}


def test_over_its_limit_a_tenants_jobs_wait_and_others_go_on(any_database: Database, queue: Queue) -> None:
    acme, umbrella = queue("acme", 4), queue("umbrella", 1)
    limit(any_database, "acme", 2)
    with any_database.write() as session:
        job_moves.take_undispatched(session, stale_seconds=60)
    assert taken(any_database, acme[0], 4) == [acme[0], umbrella[0], acme[1], None]
    with any_database.write() as session:
        assert job_moves.take_undispatched(session, stale_seconds=60) == []
    end(any_database, acme[0])
    with any_database.write() as session:
        sent = job_moves.take_undispatched(session, stale_seconds=60)
    assert sent == [], "the message of the first was spent on itself, those of the others are under way"
    assert taken(any_database, acme[2], 2) == [acme[2], None]


def test_a_job_whose_message_found_no_place_is_sent_again_when_there_is_one(
    any_database: Database, queue: Queue
) -> None:
    first, second = queue("acme", 2)
    limit(any_database, "acme", 1)
    with any_database.write() as session:
        job_moves.take_undispatched(session, stale_seconds=60)
    assert taken(any_database, first, 1) == [first]
    assert taken(any_database, second, 1) == [None]
    end(any_database, first)
    with any_database.write() as session:
        assert job_moves.take_undispatched(session, stale_seconds=60) == [(second, "cpu")]


def test_workers_that_ask_at_once_do_not_start_more_than_the_limit(
    any_database: Database, queue: Queue
) -> None:
    jobs = queue("acme", 8)
    limit(any_database, "acme", 3)
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda job: take(any_database, job), jobs))
    assert len([claim for claim in claims if claim]) == 3
    with any_database.read() as session:
        counted = session.scalars(select(WorkerTime.job_id)).all()
    assert sorted(counted) == sorted(claim.job_id for claim in claims if claim)


def test_whose_turn_it_is_is_found_by_index_among_many(any_database: Database, queue: Queue) -> None:
    queue("acme", 5000)
    queue("umbrella", 1)
    plan = _plan(any_database)
    assert "ix_jobs_turn" in plan, plan
    assert "ix_jobs_tenant_id_status" in plan or plan.count("ix_jobs_turn") > 1, plan
    for scan in ("Seq Scan on jobs", "SCAN jobs"):
        assert scan not in plan, plan


def _plan(database: Database) -> str:
    postgresql = database.engine.dialect.name == "postgresql"
    compiled = job_turns.next_turn("cpu").compile(database.engine, compile_kwargs={"literal_binds": True})
    with database.write() as session:
        if postgresql:
            session.execute(text("ANALYZE jobs"))
            session.execute(text("ANALYZE tenants"))
        explain = "EXPLAIN " if postgresql else "EXPLAIN QUERY PLAN "
        rows = session.execute(text(explain + str(compiled))).all()
        assert session.execute(select(func.count()).where(Job.queued_at < db_now())).scalar_one() == 5001
    return "\n".join(str(row[-1]) for row in rows)
