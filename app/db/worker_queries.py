"""Statements on the workers' announcements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, exists, or_, select, update
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.job_claims import needs_no_more_than
from app.db.tables import Job, Worker

FRESH_SECONDS = 45
"""A worker not seen for this long is taken for gone; it announces itself every 10 s."""


def announce(
    session: Session, worker_id: str, *, queues: str, hardware: dict[str, Any], sandbox: str
) -> None:
    """Write down that a worker is there, now."""
    seen = session.execute(
        update(Worker)
        .where(Worker.id == worker_id)
        .values(seen_at=db_now(), queues=queues, hardware=hardware, sandbox=sandbox)
        .returning(Worker.id)
    ).one_or_none()
    if seen is None:
        session.add(Worker(id=worker_id, queues=queues, hardware=hardware, sandbox=sandbox))
    session.execute(delete(Worker).where(Worker.seen_at < db_now() - 100 * FRESH_SECONDS))


def withdraw(session: Session, worker_id: str) -> None:
    """A worker leaves."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def list_fresh(session: Session) -> Sequence[Worker]:
    """Workers seen lately, oldest first."""
    return session.scalars(
        select(Worker).where(Worker.seen_at > db_now() - FRESH_SECONDS).order_by(Worker.started_at)
    ).all()


def list_serving(session: Session, queue: str) -> list[Worker]:
    """Those of them that take jobs of a queue."""
    return [worker for worker in list_fresh(session) if queue in worker.queues.split(",")]


def a_job_waits(
    session: Session,
    queues: Sequence[str],
    *,
    memory_bytes: int,
    for_seconds: float,
    sent_within_seconds: float,
) -> bool:
    """Whether a job of these queues that needs no more memory has been due for so long, although a message about it went
    out lately."""
    long_ago = db_now() - for_seconds
    waiting = exists().where(
        Job.status == "queued",
        Job.queue.in_(queues),
        needs_no_more_than(memory_bytes),
        Job.dispatched_at > db_now() - sent_within_seconds,
        Job.queued_at < long_ago,
        or_(Job.run_after.is_(None), Job.run_after < long_ago),
    )
    return bool(session.scalar(select(waiting)))
