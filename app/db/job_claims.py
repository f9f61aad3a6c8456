"""What a worker may do to the job it holds: every statement names the fence it claimed the job with.

With `job_moves` the only place where a job's status changes. Legal moves, each one UPDATE that names the state it leaves:

    queued ──claim──▶ running ──succeed──▶ succeeded
      ▲  │               │ ├────fail─────▶ failed ──┐
      │  │               │ └──cancelled──▶ cancelled─┤
      │  └──cancel──────────────────────▶ cancelled  │
      ├── give_back/release/sweep ┘                  │
      └───────────────── retry ──────────────────────┘

    queued ──succeed_as──▶ succeeded, where an earlier job had the result already
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    Row,
    and_,
    case,
    false,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from app.db import worker_time
from app.db.engine import db_now
from app.db.job_queries import add_events
from app.db.tables import Artifact, Job, JobStage
from app.version import engine_version

_TO_CANCEL = Job.cancel_requested == true()
LAST_ATTEMPT = Job.attempt >= Job.max_attempts


@dataclass(frozen=True)
class Claim:
    """What a worker holds once a job is its own."""

    job_id: str
    fence: int
    stage: int
    attempt: int
    traceparent: str | None


def needs_no_more_than(memory_bytes: int | None) -> ColumnElement[bool]:
    """Of jobs: whether a worker with so much memory can do it. None: with as much as any of them needs."""
    if memory_bytes is None:
        return true()
    return or_(Job.memory_bytes.is_(None), Job.memory_bytes <= memory_bytes)


def claim_job(
    session: Session, job_id: str, *, owner: str, lease_seconds: float, memory_bytes: int | None = None
) -> Claim | None:
    """Take a queued job, or a running one whose lease has run out. None: somebody else has it, it has ended, or it needs
    more memory than that."""
    free = or_(
        and_(Job.status == "queued", or_(Job.run_after.is_(None), Job.run_after <= db_now())),
        and_(Job.status == "running", Job.lease_until < db_now()),
    )
    row = session.execute(
        update(Job)
        .where(
            Job.id == job_id,
            Job.cancel_requested == false(),
            Job.attempt < Job.max_attempts,
            needs_no_more_than(memory_bytes),
            free,
        )
        .values(
            status="running",
            lease_owner=owner,
            lease_until=db_now() + lease_seconds,
            fence=Job.fence + 1,
            attempt=Job.attempt + 1,
            engine_version=case(
                (or_(Job.stage == 0, Job.engine_version == engine_version()), engine_version()), else_=null()
            ),
            error=null(),
            started_at=case((Job.started_at.is_(None), db_now()), else_=Job.started_at),
        )
        .returning(Job.fence, Job.stage, Job.attempt, Job.traceparent, Job.tenant_id)
    ).one_or_none()
    if row is None:
        return None
    worker_time.open_claim(session, job_id, row.fence, tenant=row.tenant_id)
    add_events(session, job_id, [("status", {"status": "running", "attempt": row.attempt, "worker": owner})])
    return Claim(job_id, row.fence, row.stage, row.attempt, row.traceparent)


def extend_lease(session: Session, claim: Claim, *, lease_seconds: float) -> bool | None:
    """Heartbeat. True: a cancel has been asked for. None: the lease is lost, stop at once."""
    row = session.execute(
        update(Job)
        .where(*_held(claim))
        .values(lease_until=db_now() + lease_seconds)
        .returning(Job.cancel_requested)
    ).one_or_none()
    if row is None:
        return None
    worker_time.count_until_now(session, claim.job_id, claim.fence)
    return bool(row.cancel_requested)


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
    """Mark stage `number` as running. False: the lease is lost, or it is not this stage's turn."""
    held = select(Job.id).where(*_held(claim), Job.stage == number).with_for_update()
    if session.execute(held).one_or_none() is None:
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
    """Append to the job's warnings; what stands there, from a try that was killed, is not said again. False: the lease is lost."""
    warnings = session.execute(
        select(Job.warnings).where(*_held(claim)).with_for_update()
    ).scalar_one_or_none()
    if warnings is None:
        return False
    if message in warnings:
        return True
    session.execute(update(Job).where(*_held(claim)).values(warnings=[*warnings, message]))
    add_events(session, claim.job_id, [("warning", {"message": message})])
    return True


def add_held_events(session: Session, claim: Claim, events: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """Append events of the job's process. False: the lease is lost and nothing is written."""
    if not _is_held(session, claim):
        return False
    add_events(session, claim.job_id, events)
    return True


def succeed(session: Session, claim: Claim, *, verdict: str, artifacts: Iterable[Artifact]) -> bool:
    """End a job well and publish its artifacts, in one transaction. False: the lease is lost or it was cancelled."""
    end = {"status": "succeeded", "verdict": verdict, "progress": 1.0, "eta_seconds": 0.0, **_ended()}
    ended = _leave(session, claim, end, Job.cancel_requested == false())
    if ended is None:
        return False
    for artifact in artifacts:
        artifact.tenant_id = ended.tenant_id
        session.add(artifact)
    add_events(session, claim.job_id, [("status", {"status": "succeeded", "verdict": verdict})])
    return True


def fail(session: Session, claim: Claim, error: dict[str, Any]) -> bool:
    """End a job badly. False: the lease is lost."""
    ended = _leave(session, claim, {"status": "failed", "error": error, **_ended()})
    if ended is not None:
        add_events(session, claim.job_id, [("status", {"status": "failed", "error": error})])
    return ended is not None


def give_back(session: Session, claim: Claim, error: dict[str, Any], *, delay_seconds: float) -> str | None:
    """Queue a job again after a fault that may pass; the last attempt fails it. None: the lease is lost."""
    back = {
        **without_worker(fails=LAST_ATTEMPT),
        "error": unless_cancelled(error),
        "run_after": db_now() + delay_seconds,
    }
    row = _leave(session, claim, back)
    if row is None:
        return None
    why = {} if row.status == "cancelled" else {"error": error}
    add_events(session, claim.job_id, [("status", {"status": row.status, **why})])
    return str(row.status)


def release(session: Session, claim: Claim) -> str | None:
    """Queue a job again because its worker shuts down, or end it if it was to be cancelled; the attempt does not count.

    None: the lease is lost.
    """
    row = _leave(session, claim, {**without_worker(fails=false()), "attempt": Job.attempt - 1})
    if row is None:
        return None
    reason = {"reason": "worker_shutdown"} if row.status == "queued" else {}
    add_events(session, claim.job_id, [("status", {"status": row.status, **reason})])
    return str(row.status)


def requests(session: Session, job_id: str) -> tuple[bool, bool]:
    """Whether somebody has asked for the job to be cancelled, and whether for its training to stop at its best."""
    row = session.execute(
        select(Job.cancel_requested, Job.keep_best_requested).where(Job.id == job_id)
    ).one_or_none()
    return (False, False) if row is None else (row.cancel_requested, row.keep_best_requested)


def end_cancelled(session: Session, claim: Claim) -> bool:
    """End a running job whose cancel was asked for, once its process is gone. False: the lease is lost."""
    ended = _leave(session, claim, {"status": "cancelled", **_ended()})
    if ended is not None:
        add_events(session, claim.job_id, [("status", {"status": "cancelled"})])
    return ended is not None


def without_worker(*, fails: ColumnElement[bool]) -> dict[str, Any]:
    """What a job becomes whose worker is gone or leaves it: queued, or ended if it is to be cancelled or `fails`.

    Nobody may claim a job that is to be cancelled: queued, it would stay for ever.
    """
    return {
        "status": case((_TO_CANCEL, "cancelled"), (fails, "failed"), else_="queued"),
        "ended_at": case((or_(_TO_CANCEL, fails), db_now()), else_=null()),
        "lease_owner": None,
        "lease_until": None,
        "dispatched_at": None,
    }


def unless_cancelled(error: dict[str, Any]) -> ColumnElement[Any]:
    """The error of a job that is not to be cancelled."""
    return case((_TO_CANCEL, null()), else_=literal(error, JSON))


def _leave(
    session: Session, claim: Claim, values: dict[str, Any], *where: ColumnElement[bool]
) -> Row[str, str] | None:
    """Change a job that is held as its worker leaves it: (status, tenant_id) afterwards. None: the lease is lost."""
    row = session.execute(
        update(Job).where(*_held(claim), *where).values(values).returning(Job.status, Job.tenant_id)
    ).one_or_none()
    if row is not None:
        worker_time.count_until_now(session, claim.job_id, claim.fence)
    return row


def _held(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (Job.id == claim.job_id, Job.fence == claim.fence, Job.status == "running")


def _is_held(session: Session, claim: Claim) -> bool:
    found = session.execute(select(Job.id).where(*_held(claim)).with_for_update()).one_or_none()
    return found is not None


def _update_stage(session: Session, claim: Claim, number: int, **values: Any) -> str:
    """Change one stage of a job that is held, and return its name."""
    return session.execute(
        update(JobStage)
        .where(JobStage.job_id == claim.job_id, JobStage.number == number)
        .values(**values)
        .returning(JobStage.name)
    ).scalar_one()


def _ended() -> dict[str, Any]:
    return {"lease_owner": None, "lease_until": None, "ended_at": db_now()}
