"""The ledger of workers' time: a row for each claim, of which a tenant's worker seconds are the sum.

A row says for how long its claim is known to have been held: up to its last heartbeat, and once the worker gave the job
up, to that. So it is right at any time, whatever dies, and nobody has to close it: when a job is taken back from a lost
worker, nothing counts after the last it was heard of.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Select, case, func, insert, select, update
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.tables import WorkerTime


@dataclass(frozen=True)
class Month:
    """A calendar month in UTC, from its first second to the first of the next, in seconds since the epoch."""

    start: float
    end: float


def open_claim(session: Session, job_id: str, fence: int, *, tenant: str) -> None:
    """Begin to count the time of a claim."""
    session.execute(
        insert(WorkerTime).values(
            job_id=job_id, fence=fence, tenant_id=tenant, started_at=db_now(), held_until=db_now()
        )
    )


def count_until_now(session: Session, job_id: str, fence: int) -> None:
    """Count the time of a claim that is, or was just, held."""
    session.execute(
        update(WorkerTime)
        .where(WorkerTime.job_id == job_id, WorkerTime.fence == fence)
        .values(held_until=db_now())
    )


def used_this_month(session: Session) -> tuple[float, Month]:
    """Worker seconds of the session's tenant, and the month they are of. Of a claim that began before, the part since."""
    month = month_of(session.execute(select(db_now())).scalar_one())
    return float(session.execute(used_since(month.start)).scalar_one()), month


def used_since(start: float) -> Select[float]:
    """The sum of held seconds after `start`: one range of an index."""
    since = case((WorkerTime.started_at < start, start), else_=WorkerTime.started_at)
    return select(func.coalesce(func.sum(WorkerTime.held_until - since), 0.0)).where(
        WorkerTime.held_until > start
    )


def month_of(seconds: float) -> Month:
    """The month that this time is in."""
    first = datetime.fromtimestamp(seconds, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return Month(first.timestamp(), following.timestamp())
