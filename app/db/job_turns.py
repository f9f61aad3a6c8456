"""Whose turn it is when a worker is free.

A message says that some job waits; which one is started is decided here: of the tenants with jobs in that queue, the one
with the fewest running, of several the one that was served longest ago, and of its jobs the most urgent, then the oldest.
A tenant with ten thousand jobs so delays another's first by one job. There are as many messages as jobs, so none waits
for want of one.
"""

from __future__ import annotations

from sqlalchemy import ScalarSelect, Select, false, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.db.engine import db_now
from app.db.job_claims import Claim, claim_job, needs_no_more_than
from app.db.tables import Job, Tenant


def claim_next(
    session: Session, job_id: str, *, owner: str, lease_seconds: float, memory_bytes: int | None = None
) -> Claim | None:
    """Take the job whose turn it is in the queue of `job_id`; where none may start, that one, if its lease has run out.

    `memory_bytes` are the worker's: what needs more is left to others. For the service: sees every tenant. None: there is
    nothing to take. The message is spent then: if its job still waits, for a place among its tenant's running jobs or a
    worker with more memory, the sweeper sends another.
    """
    job = session.execute(select(Job.queue, Job.status).where(Job.id == job_id)).one_or_none()
    if job is None:
        return None
    while (turn := session.execute(next_turn(job.queue, memory_bytes)).one_or_none()) is not None:
        # The turn was given by need, which does not change.
        claim = _take_turn(session, turn.tenant_id, turn.job_id, owner=owner, lease_seconds=lease_seconds)
        if claim is not None:
            return claim
    if job.status == "running":
        return claim_job(session, job_id, owner=owner, lease_seconds=lease_seconds, memory_bytes=memory_bytes)
    session.execute(update(Job).where(Job.id == job_id, Job.status == "queued").values(dispatched_at=None))
    return None


def _take_turn(
    session: Session, tenant: str, job_id: str, *, owner: str, lease_seconds: float
) -> Claim | None:
    """Claim a job. None: another worker was faster, to it or to the tenant's last place."""
    with session.begin_nested() as attempt:
        claim = claim_job(session, job_id, owner=owner, lease_seconds=lease_seconds)
        if claim is None:
            return None
        # From here on the tenant's row is locked, and what is counted stays true.
        session.execute(update(Tenant).where(Tenant.id == tenant).values(turn=_last_turn() + 1))
        over = select(Tenant.id).where(Tenant.id == tenant, running_jobs() > Tenant.max_running_jobs)
        if session.execute(over).one_or_none() is not None:
            attempt.rollback()
            return None
    return claim


def running_jobs() -> ScalarSelect[int]:
    """How many jobs of a tenant run, inside a query of tenants."""
    return (
        select(func.count())
        .where(Job.tenant_id == Tenant.id, Job.status == "running")
        .correlate(Tenant)
        .scalar_subquery()
    )


def at_their_limit() -> Select[str]:
    """Tenants none of whose waiting jobs may start now."""
    return select(Tenant.id).where(Tenant.max_running_jobs <= running_jobs())


def next_turn(queue: str, memory_bytes: int | None = None) -> Select[tuple[str, str]]:
    """(tenant_id, job_id) of the job whose turn it is, of those that need no more memory. One look into an index for each
    tenant, past its jobs that need more."""
    first = (
        select(Job.id)
        .where(
            Job.tenant_id == Tenant.id,
            Job.queue == queue,
            Job.status == "queued",
            Job.cancel_requested == false(),
            Job.attempt < Job.max_attempts,
            needs_no_more_than(memory_bytes),
            or_(Job.run_after.is_(None), Job.run_after <= db_now()),
        )
        .order_by(Job.priority, Job.queued_at)
        .limit(1)
        .correlate(Tenant)
        .scalar_subquery()
    )
    tenants = select(
        Tenant.id.label("tenant_id"),
        first.label("job_id"),
        running_jobs().label("running"),
        Tenant.turn,
        Tenant.max_running_jobs,
    ).subquery()
    return (
        select(tenants.c.tenant_id, tenants.c.job_id)
        .where(
            tenants.c.job_id.is_not(None),
            or_(tenants.c.max_running_jobs.is_(None), tenants.c.running < tenants.c.max_running_jobs),
        )
        .order_by(tenants.c.running, tenants.c.turn, tenants.c.tenant_id)
        .limit(1)
    )


def _last_turn() -> ScalarSelect[int]:
    others = aliased(Tenant)
    return select(func.max(others.turn)).scalar_subquery()
