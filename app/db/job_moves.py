"""What users and the sweeper do to jobs they do not hold: create, cancel, retry, take back, send, delete.

`job_claims` draws the legal moves of a job's status.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    and_,
    case,
    delete,
    false,
    insert,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.job_claims import LAST_ATTEMPT, unless_cancelled, without_worker
from app.db.job_queries import TERMINAL, add_events, list_stages
from app.db.job_turns import at_their_limit
from app.db.tables import Artifact, Job, JobLabel, JobStage


@dataclass(frozen=True)
class Swept:
    """A job whose lease had run out, and what became of it."""

    job_id: str
    status: str


def create_job(session: Session, job: Job, stages: Sequence[str]) -> None:
    """Insert a queued job with its stages and its first event."""
    session.add(job)
    session.flush()
    session.execute(
        insert(JobStage),
        [
            {"tenant_id": job.tenant_id, "job_id": job.id, "number": number, "name": name, "metrics": {}}
            for number, name in enumerate(stages)
        ],
    )
    if job.labels:
        session.execute(
            insert(JobLabel),
            [
                {"tenant_id": job.tenant_id, "job_id": job.id, "name": name, "value": value}
                for name, value in job.labels.items()
            ],
        )
    add_events(session, job.id, [("status", {"status": "queued"})])


def succeed_as(session: Session, job_id: str, earlier: Job, artifacts: Sequence[Artifact]) -> None:
    """End a queued job at once with the result of one that has succeeded: its verdict, figures and files."""
    original = earlier.result_of or earlier.id
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "queued")
        .values(
            status="succeeded",
            verdict=earlier.verdict,
            engine_version=earlier.engine_version,
            result_of=original,
            stage=earlier.stage,
            progress=1.0,
            eta_seconds=0.0,
            ended_at=db_now(),
        )
        .returning(Job.id)
    ).one()
    for done, stage in zip(list_stages(session, earlier.id), list_stages(session, job_id), strict=True):
        stage.status, stage.progress, stage.metrics = "done", 1.0, done.metrics
    session.add_all(artifacts)
    session.flush()
    end = {"status": "succeeded", "verdict": earlier.verdict, "result_of": original}
    add_events(session, job_id, [("status", end)])


def request_cancel(session: Session, job_id: str) -> str | None:
    """Ask for a cancel: a queued job ends at once, a running one when its worker hears of it. Returns the status
    afterwards, None if the job has already ended."""
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(("queued", "running")))
        .values(
            cancel_requested=true(),
            status=case((Job.status == "queued", "cancelled"), else_=Job.status),
            ended_at=case((Job.status == "queued", db_now()), else_=null()),
        )
        .returning(Job.status)
    ).one_or_none()
    if row is None:
        return None
    status = "cancelled" if row.status == "cancelled" else "cancelling"
    add_events(session, job_id, [("status", {"status": status})])
    return status


def request_best(session: Session, job_id: str) -> bool:
    """Ask a running job to stop training and go on with the best state so far. False: it does not run.

    What it comes to is no longer what its spec says, and is not used for other jobs.
    """
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "running")
        .values(keep_best_requested=true(), result_key=null())
        .returning(Job.id)
    ).one_or_none()
    if row is not None:
        add_events(session, job_id, [("status", {"status": "running", "training": "stopping"})])
    return row is not None


def retry_job(session: Session, job_id: str) -> bool:
    """Queue a failed or cancelled job again; committed stages are kept. False: it is in no state for that."""
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(("failed", "cancelled")))
        .values(
            status="queued",
            attempt=0,
            cancel_requested=false(),
            keep_best_requested=false(),
            error=null(),
            dispatched_at=None,
            run_after=None,
            queued_at=db_now(),
            started_at=None,
            ended_at=None,
        )
        .returning(Job.id)
    ).one_or_none()
    if row is None:
        return False
    add_events(session, job_id, [("status", {"status": "queued", "retry": True})])
    return True


def sweep_lost(session: Session) -> list[Swept]:
    """Jobs whose worker has not renewed its lease: back to the queue, or ended. Several sweepers may run at once."""
    lost = {"code": "worker_lost", "detail": "The worker that ran this job stopped renewing its lease."}
    rows = session.execute(
        update(Job)
        .where(Job.status == "running", Job.lease_until < db_now())
        .values(**without_worker(fails=LAST_ATTEMPT), error=unless_cancelled(lost))
        .returning(Job.id, Job.status)
    ).all()
    for row in rows:
        add_events(session, row.id, [("status", {"status": row.status, "reason": "worker_lost"})])
    return [Swept(row.id, row.status) for row in rows]


def take_undispatched(session: Session, *, stale_seconds: float, limit: int = 500) -> list[tuple[str, str]]:
    """Queued jobs whose message was never sent, or so long ago that it may be lost: (id, queue), now marked sent."""
    due = and_(
        Job.status == "queued",
        Job.tenant_id.not_in(at_their_limit()),
        or_(Job.run_after.is_(None), Job.run_after <= db_now()),
        or_(Job.dispatched_at.is_(None), Job.dispatched_at < db_now() - stale_seconds),
    )
    chosen = select(Job.id).where(due).order_by(Job.queued_at).limit(limit).scalar_subquery()
    rows = session.execute(
        update(Job).where(Job.id.in_(chosen), due).values(dispatched_at=db_now()).returning(Job.id, Job.queue)
    ).all()
    return [(row.id, row.queue) for row in rows]


def forget_dispatch(session: Session, job_ids: Sequence[str]) -> None:
    """The broker took no message for these jobs: the next sweep tries again."""
    session.execute(update(Job).where(Job.id.in_(job_ids), Job.status == "queued").values(dispatched_at=None))


def mark_dispatched(session: Session, job_id: str) -> None:
    """Remember that the job's message is about to be sent, so that the sweeper waits before sending another."""
    session.execute(
        update(Job).where(Job.id == job_id, Job.status == "queued").values(dispatched_at=db_now())
    )


def delete_job(session: Session, job_id: str) -> bool:
    """Delete a job that has ended, with all its rows. False: it has not ended."""
    gone = session.execute(
        delete(Job).where(Job.id == job_id, Job.status.in_(TERMINAL)).returning(Job.id)
    ).one_or_none()
    return gone is not None
