"""Reading jobs, their stages, events and artifacts, and appending events. Status changes in `job_claims` and `job_moves`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    and_,
    false,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from app.db import webhook_queries
from app.db.engine import db_now
from app.db.tables import Artifact, Job, JobEvent, JobLabel, JobStage

TERMINAL = ("succeeded", "failed", "cancelled")


def get_job(session: Session, job_id: str) -> Job | None:
    """A job by id."""
    return session.get(Job, job_id)


def get_jobs(session: Session, job_ids: Sequence[str]) -> Sequence[Job]:
    """Those of these jobs that there are."""
    return session.scalars(select(Job).where(Job.id.in_(job_ids))).all()


def list_jobs(
    session: Session,
    *,
    status: str | None,
    model_id: str | None,
    labels: Mapping[str, str],
    after: str | None,
    limit: int,
) -> Sequence[Job]:
    """Jobs for which everything given holds, newest first, from behind the id `after`. `cancelling` counts as a status."""
    # Of several labels one is walked along its index, in the order asked for.
    query, number = select(Job), Job.id
    for name, value in list(labels.items())[:1]:
        number = JobLabel.job_id
        query = query.join(JobLabel, JobLabel.job_id == Job.id).where(
            JobLabel.name == name, JobLabel.value == value
        )
    query = query.order_by(number.desc()).limit(limit)
    if status is not None:
        query = query.where(Job.status == ("running" if status == "cancelling" else status))
    if status in ("running", "cancelling"):
        query = query.where(Job.cancel_requested == (true() if status == "cancelling" else false()))
    if model_id is not None:
        query = query.where(Job.model_id == model_id)
    for name, value in list(labels.items())[1:]:
        others = select(JobLabel.job_id).where(JobLabel.name == name, JobLabel.value == value)
        query = query.where(number.in_(others))
    return session.scalars(query if after is None else query.where(number < after)).all()


def list_stages(session: Session, job_id: str) -> Sequence[JobStage]:
    """The stages of a job, in order."""
    return session.scalars(select(JobStage).where(JobStage.job_id == job_id).order_by(JobStage.number)).all()


def stages_of(session: Session, job_ids: Sequence[str]) -> dict[str, list[JobStage]]:
    """The stages of several jobs, each job's in order."""
    found: dict[str, list[JobStage]] = {}
    query = select(JobStage).where(JobStage.job_id.in_(job_ids)).order_by(JobStage.job_id, JobStage.number)
    for stage in session.scalars(query):
        found.setdefault(stage.job_id, []).append(stage)
    return found


def list_artifacts(session: Session, job_id: str) -> Sequence[Artifact]:
    """The artifacts of a job, by kind and path."""
    return session.scalars(
        select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.kind, Artifact.path)
    ).all()


def artifacts_of(session: Session, job_ids: Sequence[str]) -> dict[str, list[Artifact]]:
    """The artifacts of several jobs, each job's by kind and path."""
    found: dict[str, list[Artifact]] = {}
    query = select(Artifact).where(Artifact.job_id.in_(job_ids)).order_by(Artifact.kind, Artifact.path)
    for artifact in session.scalars(query):
        found.setdefault(artifact.job_id, []).append(artifact)
    return found


def get_artifact(session: Session, artifact_id: str) -> Artifact | None:
    """An artifact by id."""
    return session.get(Artifact, artifact_id)


def list_events(session: Session, job_id: str, *, after: int, limit: int) -> Sequence[JobEvent]:
    """Events with a number above `after`, in order."""
    return session.scalars(
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.number > after)
        .order_by(JobEvent.number)
        .limit(limit)
    ).all()


def add_events(session: Session, job_id: str, events: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Append events; the counter on the job's row makes their numbers dense and ordered under concurrency."""
    if not events:
        return
    job = session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(event_count=Job.event_count + len(events))
        .returning(Job.event_count, Job.tenant_id)
    ).one()
    first = job.event_count - len(events) + 1
    session.execute(
        insert(JobEvent),
        [
            {
                "tenant_id": job.tenant_id,
                "job_id": job_id,
                "number": first + offset,
                "type": kind,
                "data": data,
            }
            for offset, (kind, data) in enumerate(events)
        ],
    )
    for kind, data in events:
        if kind == "status":
            webhook_queries.tell(session, job_id, job.tenant_id, data)


def count_events(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    """How many events those of these jobs have that have not ended."""
    rows = session.execute(
        select(Job.id, Job.event_count).where(Job.id.in_(job_ids), Job.status.not_in(TERMINAL))
    )
    return {row.id: row.event_count for row in rows}


def ended_among(session: Session, job_ids: Sequence[str], *, seconds_ago: float) -> set[str]:
    """Which of these jobs are not known, succeeded, or ended that long ago: nobody needs their scratch directory."""
    recent = and_(Job.status.in_(("failed", "cancelled")), Job.ended_at > db_now() - seconds_ago)
    needed = or_(Job.status.not_in(TERMINAL), recent)
    return set(job_ids) - set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), needed)).all())
