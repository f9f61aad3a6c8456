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
from app.db.job_claims import Claim, claim_job
from app.db.tables import Job, Tenant


def claim_next(session: Session, job_id: str, *, owner: str, lease_seconds: float) -> Claim | None:
    """Take the job whose turn it is in the queue of `job_id`; where none waits, that one, if its lease has run out.

    For the service: sees every tenant. None: there is nothing to take.
    """
    queue = session.execute(select(Job.queue).where(Job.id == job_id)).scalar_one_or_none()
    if queue is None:
        return None
    while (turn := session.execute(next_turn(queue)).one_or_none()) is not None:
        claim = claim_job(session, turn.job_id, owner=owner, lease_seconds=lease_seconds)
        if claim is not None:
            session.execute(update(Tenant).where(Tenant.id == turn.tenant_id).values(turn=_last_turn() + 1))
            return claim
        # Another worker took it a moment ago.
    return claim_job(session, job_id, owner=owner, lease_seconds=lease_seconds)


def next_turn(queue: str) -> Select[tuple[str, str]]:
    """(tenant_id, job_id) of the job whose turn it is. One look into an index for each tenant."""
    first = (
        select(Job.id)
        .where(
            Job.tenant_id == Tenant.id,
            Job.queue == queue,
            Job.status == "queued",
            Job.cancel_requested == false(),
            Job.attempt < Job.max_attempts,
            or_(Job.run_after.is_(None), Job.run_after <= db_now()),
        )
        .order_by(Job.priority, Job.queued_at)
        .limit(1)
        .correlate(Tenant)
        .scalar_subquery()
    )
    running = (
        select(func.count())
        .where(Job.tenant_id == Tenant.id, Job.status == "running")
        .correlate(Tenant)
        .scalar_subquery()
    )
    tenants = select(
        Tenant.id.label("tenant_id"),
        first.label("job_id"),
        running.label("running"),
        Tenant.turn,
    ).subquery()
    return (
        select(tenants.c.tenant_id, tenants.c.job_id)
        .where(tenants.c.job_id.is_not(None))
        .order_by(tenants.c.running, tenants.c.turn, tenants.c.tenant_id)
        .limit(1)
    )


def _last_turn() -> ScalarSelect[int]:
    others = aliased(Tenant)
    return select(func.max(others.turn)).scalar_subquery()
