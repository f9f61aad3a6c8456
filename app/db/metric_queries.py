"""What /metrics shows, counted in the database, so that every API process gives the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Float, case, cast, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.db.job_queries import TERMINAL
from app.db.tables import Artifact, Dataset, Job, ModelFile, Upload


@dataclass(frozen=True)
class Durations:
    """How long the jobs of one technique that ended one way took."""

    technique: str
    outcome: str
    below: tuple[int, ...]
    """How many took at most each of the bounds asked for."""
    count: int
    total_seconds: float


def jobs_by_queue(session: Session) -> Sequence[tuple[str, str, int]]:
    """(queue, status, number of jobs)."""
    rows = session.execute(select(Job.queue, Job.status, func.count()).group_by(Job.queue, Job.status))
    return [(row[0], row[1], row[2]) for row in rows]


def running_seconds(session: Session, bounds: Sequence[float]) -> list[Durations]:
    """Seconds from first start to end of the jobs that have ended, by technique and outcome."""
    return _durations(session, Job.ended_at - Job.started_at, bounds)


def queued_seconds(session: Session, bounds: Sequence[float]) -> list[Durations]:
    """Seconds from being queued to the first start, of the jobs that have ended."""
    return _durations(session, Job.started_at - Job.queued_at, bounds)


def stored_bytes(session: Session) -> dict[str, int]:
    """Bytes of models, datasets and artifacts that have not expired, by kind; a blob referred to twice counts twice."""
    return {
        "model": _sum(session, ModelFile.bytes),
        "dataset": _sum(session, Dataset.bytes),
        "artifact": _sum(session, Artifact.bytes, Artifact.expired_at.is_(None)),
    }


def uploads_by_status(session: Session) -> Sequence[tuple[str, int, int]]:
    """(status, number, announced bytes) of uploads that have not been used up."""
    rows = session.execute(
        select(Upload.status, func.count(), cast(func.coalesce(func.sum(Upload.size), 0), Float)).group_by(
            Upload.status
        )
    )
    return [(row[0], row[1], int(row[2])) for row in rows]


def _durations(
    session: Session, seconds: ColumnElement[float | None], bounds: Sequence[float]
) -> list[Durations]:
    # A retried job is queued anew while its first start stays: no time is negative.
    positive = case((seconds > 0, seconds), else_=0.0)
    below = [func.sum(case((positive <= bound, 1), else_=0)) for bound in bounds]
    rows = session.execute(
        select(Job.technique, Job.status, func.count(), func.sum(positive), *below)
        .where(Job.status.in_(TERMINAL), Job.started_at.is_not(None))
        .group_by(Job.technique, Job.status)
    )
    return [Durations(row[0], row[1], tuple(int(n) for n in row[4:]), row[2], float(row[3])) for row in rows]


def _sum(session: Session, column: InstrumentedAttribute[int], *where: ColumnElement[bool]) -> int:
    return int(session.execute(select(func.coalesce(func.sum(column), 0)).where(*where)).scalar_one())
