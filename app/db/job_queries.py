"""Every statement on jobs, their stages, events and artifacts.

A job's status changes only here. Legal moves, each one UPDATE that names the state it leaves:

    queued ──claim──▶ running ──succeed──▶ succeeded
      ▲  │               │ ├────fail─────▶ failed ──┐
      │  │               │ └──cancelled──▶ cancelled─┤
      │  └──cancel──────────────────────▶ cancelled  │
      ├── give_back/release/sweep ┘                  │
      └───────────────── retry ──────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    and_,
    case,
    delete,
    false,
    insert,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.tables import Artifact, Job, JobEvent, JobStage

TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Claim:
    """What a worker holds once a job is its own."""

    job_id: str
    fence: int
    stage: int
    attempt: int


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
            {"job_id": job.id, "number": number, "name": name, "metrics": {}}
            for number, name in enumerate(stages)
        ],
    )
    add_events(session, job.id, [("status", {"status": "queued"})])


def claim_job(session: Session, job_id: str, *, owner: str, lease_seconds: float) -> Claim | None:
    """Take a queued job, or a running one whose lease has run out. None: somebody else has it, or it has ended."""
    free = or_(
        and_(Job.status == "queued", or_(Job.run_after.is_(None), Job.run_after <= db_now())),
        and_(Job.status == "running", Job.lease_until < db_now()),
    )
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.cancel_requested == false(), Job.attempt < Job.max_attempts, free)
        .values(
            status="running",
            lease_owner=owner,
            lease_until=db_now() + lease_seconds,
            fence=Job.fence + 1,
            attempt=Job.attempt + 1,
            error=null(),
            started_at=case((Job.started_at.is_(None), db_now()), else_=Job.started_at),
        )
        .returning(Job.fence, Job.stage, Job.attempt)
    ).one_or_none()
    if row is None:
        return None
    add_events(session, job_id, [("status", {"status": "running", "attempt": row.attempt, "worker": owner})])
    return Claim(job_id, row.fence, row.stage, row.attempt)


def extend_lease(session: Session, claim: Claim, *, lease_seconds: float) -> bool | None:
    """Heartbeat. True: a cancel has been asked for. None: the lease is lost, stop at once."""
    row = session.execute(
        update(Job)
        .where(*_held(claim))
        .values(lease_until=db_now() + lease_seconds)
        .returning(Job.cancel_requested)
    ).one_or_none()
    return None if row is None else row.cancel_requested


def commit_stage(
    session: Session, claim: Claim, number: int, directory: str, metrics: dict[str, Any]
) -> bool:
    """Commit stage `number` (from 0) with its files. False: the lease is lost, or it is not this stage's turn."""
    moved = session.execute(
        update(Job).where(*_held(claim), Job.stage == number).values(stage=number + 1).returning(Job.id)
    ).one_or_none()
    if moved is None:
        return False
    name = _update_stage(
        session,
        claim,
        number,
        status="done",
        progress=1.0,
        directory=directory,
        metrics=metrics,
        ended_at=db_now(),
    )
    event = {"stage": number, "name": name, "status": "done", "metrics": metrics}
    add_events(session, claim.job_id, [("stage", event)])
    return True


def rewind_stages(session: Session, claim: Claim, stage: int) -> bool:
    """Forget committed stages from `stage` on: their files are not on this worker. False: the lease is lost."""
    held = session.execute(
        update(Job).where(*_held(claim)).values(stage=stage).returning(Job.id)
    ).one_or_none()
    if held is None:
        return False
    session.execute(
        update(JobStage)
        .where(JobStage.job_id == claim.job_id, JobStage.number >= stage)
        .values(status="pending", progress=0.0, directory=None, metrics={}, started_at=None, ended_at=None)
    )
    return True


def start_stage(session: Session, claim: Claim, number: int) -> bool:
    """Mark stage `number` as running. False: the lease is lost."""
    if not _is_held(session, claim):
        return False
    name = _update_stage(
        session, claim, number, status="running", progress=0.0, started_at=db_now(), ended_at=None
    )
    add_events(session, claim.job_id, [("stage", {"stage": number, "name": name, "status": "running"})])
    return True


def set_progress(
    session: Session, claim: Claim, *, progress: float, eta_seconds: float | None, event: dict[str, Any]
) -> bool:
    """Write down how far a job is (0 to 1), and its stage, which `event` names. False: the lease is lost."""
    held = session.execute(
        update(Job).where(*_held(claim)).values(progress=progress, eta_seconds=eta_seconds).returning(Job.id)
    ).one_or_none()
    if held is None:
        return False
    _update_stage(session, claim, event["stage"], progress=event["fraction"])
    add_events(session, claim.job_id, [("progress", {**event, "progress": round(progress, 4)})])
    return True


def add_warning(session: Session, claim: Claim, message: str) -> bool:
    """Append to the job's warnings. False: the lease is lost."""
    warnings = session.execute(
        select(Job.warnings).where(*_held(claim)).with_for_update()
    ).scalar_one_or_none()
    if warnings is None:
        return False
    session.execute(update(Job).where(*_held(claim)).values(warnings=[*warnings, message]))
    add_events(session, claim.job_id, [("warning", {"message": message})])
    return True


def succeed(session: Session, claim: Claim, *, verdict: str, artifacts: Iterable[Artifact]) -> bool:
    """End a job well and publish its artifacts, in one transaction. False: the lease is lost or it was cancelled."""
    ended = session.execute(
        update(Job)
        .where(*_held(claim), Job.cancel_requested == false())
        .values(status="succeeded", verdict=verdict, progress=1.0, eta_seconds=0.0, **_ended())
        .returning(Job.id)
    ).one_or_none()
    if ended is None:
        return False
    session.add_all(artifacts)
    add_events(session, claim.job_id, [("status", {"status": "succeeded", "verdict": verdict})])
    return True


def fail(session: Session, claim: Claim, error: dict[str, Any]) -> bool:
    """End a job badly. False: the lease is lost."""
    ended = session.execute(
        update(Job).where(*_held(claim)).values(status="failed", error=error, **_ended()).returning(Job.id)
    ).one_or_none()
    if ended is not None:
        add_events(session, claim.job_id, [("status", {"status": "failed", "error": error})])
    return ended is not None


def give_back(session: Session, claim: Claim, error: dict[str, Any], *, delay_seconds: float) -> str | None:
    """Queue a job again after a fault that may pass; the last attempt fails it. None: the lease is lost."""
    last = Job.attempt >= Job.max_attempts
    row = session.execute(
        update(Job)
        .where(*_held(claim))
        .values(
            status=case((last, "failed"), else_="queued"),
            error=error,
            lease_owner=None,
            lease_until=None,
            dispatched_at=None,
            run_after=db_now() + delay_seconds,
            ended_at=case((last, db_now()), else_=null()),
        )
        .returning(Job.status)
    ).one_or_none()
    if row is None:
        return None
    add_events(session, claim.job_id, [("status", {"status": row.status, "error": error})])
    return str(row.status)


def release(session: Session, claim: Claim) -> bool:
    """Queue a job again because its worker shuts down; the attempt does not count. False: the lease is lost."""
    row = session.execute(
        update(Job)
        .where(*_held(claim))
        .values(
            status="queued", attempt=Job.attempt - 1, lease_owner=None, lease_until=None, dispatched_at=None
        )
        .returning(Job.id)
    ).one_or_none()
    if row is not None:
        add_events(session, claim.job_id, [("status", {"status": "queued", "reason": "worker_shutdown"})])
    return row is not None


def is_cancel_requested(session: Session, job_id: str) -> bool:
    """Whether somebody has asked for the job to be cancelled."""
    return bool(session.execute(select(Job.cancel_requested).where(Job.id == job_id)).scalar_one_or_none())


def end_cancelled(session: Session, claim: Claim) -> bool:
    """End a running job whose cancel was asked for, once its process is gone. False: the lease is lost."""
    ended = session.execute(
        update(Job).where(*_held(claim)).values(status="cancelled", **_ended()).returning(Job.id)
    ).one_or_none()
    if ended is not None:
        add_events(session, claim.job_id, [("status", {"status": "cancelled"})])
    return ended is not None


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


def retry_job(session: Session, job_id: str) -> bool:
    """Queue a failed or cancelled job again; committed stages are kept. False: it is in no state for that."""
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(("failed", "cancelled")))
        .values(
            status="queued",
            attempt=0,
            cancel_requested=false(),
            error=null(),
            dispatched_at=None,
            run_after=None,
            queued_at=db_now(),
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
    lost = literal(
        {"code": "worker_lost", "detail": "The worker that ran this job stopped renewing its lease."}, JSON
    )
    ends = or_(Job.cancel_requested == true(), Job.attempt >= Job.max_attempts)
    rows = session.execute(
        update(Job)
        .where(Job.status == "running", Job.lease_until < db_now())
        .values(
            status=case(
                (Job.cancel_requested == true(), "cancelled"),
                (Job.attempt >= Job.max_attempts, "failed"),
                else_="queued",
            ),
            error=case((Job.cancel_requested == true(), null()), else_=lost),
            lease_owner=None,
            lease_until=None,
            dispatched_at=None,
            ended_at=case((ends, db_now()), else_=null()),
        )
        .returning(Job.id, Job.status)
    ).all()
    for row in rows:
        add_events(session, row.id, [("status", {"status": row.status, "reason": "worker_lost"})])
    return [Swept(row.id, row.status) for row in rows]


def take_undispatched(session: Session, *, stale_seconds: float, limit: int = 500) -> list[tuple[str, str]]:
    """Queued jobs whose message was never sent, or so long ago that it may be lost: (id, queue), now marked sent."""
    due = and_(
        Job.status == "queued",
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


def add_events(session: Session, job_id: str, events: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Append events; the counter on the job's row makes their numbers dense and ordered under concurrency."""
    if not events:
        return
    last = session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(event_count=Job.event_count + len(events))
        .returning(Job.event_count)
    ).scalar_one()
    first = last - len(events) + 1
    session.execute(
        insert(JobEvent),
        [
            {"job_id": job_id, "number": first + offset, "type": kind, "data": data}
            for offset, (kind, data) in enumerate(events)
        ],
    )


def add_held_events(session: Session, claim: Claim, events: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """Append events of the job's process. False: the lease is lost and nothing is written."""
    if not _is_held(session, claim):
        return False
    add_events(session, claim.job_id, events)
    return True


def list_events(session: Session, job_id: str, *, after: int, limit: int) -> Sequence[JobEvent]:
    """Events with a number above `after`, in order."""
    return session.scalars(
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.number > after)
        .order_by(JobEvent.number)
        .limit(limit)
    ).all()


def get_job(session: Session, job_id: str) -> Job | None:
    """A job by id."""
    return session.get(Job, job_id)


def list_stages(session: Session, job_id: str) -> Sequence[JobStage]:
    """The stages of a job, in order."""
    return session.scalars(select(JobStage).where(JobStage.job_id == job_id).order_by(JobStage.number)).all()


def list_artifacts(session: Session, job_id: str) -> Sequence[Artifact]:
    """The artifacts of a job, by kind and path."""
    return session.scalars(
        select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.kind, Artifact.path)
    ).all()


def ended_among(session: Session, job_ids: Sequence[str], *, seconds_ago: float) -> set[str]:
    """Which of these jobs are not known, succeeded, or ended that long ago: nobody needs their scratch directory."""
    recent = and_(Job.status.in_(("failed", "cancelled")), Job.ended_at > db_now() - seconds_ago)
    needed = or_(Job.status.not_in(TERMINAL), recent)
    return set(job_ids) - set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), needed)).all())


def delete_job(session: Session, job_id: str) -> bool:
    """Delete a job that has ended, with all its rows. False: it has not ended."""
    gone = session.execute(
        delete(Job).where(Job.id == job_id, Job.status.in_(TERMINAL)).returning(Job.id)
    ).one_or_none()
    return gone is not None


def _held(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (Job.id == claim.job_id, Job.fence == claim.fence, Job.status == "running")


def _update_stage(session: Session, claim: Claim, number: int, **values: Any) -> str:
    """Change one stage of a job that is held, and return its name."""
    return session.execute(
        update(JobStage)
        .where(JobStage.job_id == claim.job_id, JobStage.number == number)
        .values(**values)
        .returning(JobStage.name)
    ).scalar_one()


def _is_held(session: Session, claim: Claim) -> bool:
    found = session.execute(select(Job.id).where(*_held(claim)).with_for_update()).one_or_none()
    return found is not None


def _ended() -> dict[str, Any]:
    return {"lease_owner": None, "lease_until": None, "ended_at": db_now()}


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
    query = select(Job).order_by(Job.id.desc()).limit(limit)
    if status is not None:
        query = query.where(Job.status == ("running" if status == "cancelling" else status))
    if status in ("running", "cancelling"):
        query = query.where(Job.cancel_requested == (true() if status == "cancelling" else false()))
    if model_id is not None:
        query = query.where(Job.model_id == model_id)
    for name, value in labels.items():
        query = query.where(Job.labels[name].as_string() == value)
    return session.scalars(query if after is None else query.where(Job.id < after)).all()


def stages_of(session: Session, job_ids: Sequence[str]) -> dict[str, list[JobStage]]:
    """The stages of several jobs, each job's in order."""
    found: dict[str, list[JobStage]] = {}
    query = select(JobStage).where(JobStage.job_id.in_(job_ids)).order_by(JobStage.job_id, JobStage.number)
    for stage in session.scalars(query):
        found.setdefault(stage.job_id, []).append(stage)
    return found


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
