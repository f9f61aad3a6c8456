"""What can be done with jobs. Status changes are those of app.db.job_moves; messages go out after the commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from app.db import job_moves, job_queries, model_queries, worker_queries
from app.db.engine import after_commit, get_database
from app.db.tables import Artifact, Job
from app.errors import Conflict, JobFailed, NotFound
from app.ids import new_id
from app.services.job_view import (
    NAME_LABEL,
    PRIORITIES,
    EventView,
    JobView,
    Priority,
    event_view,
    has_ended,
    job_view,
    shown_status,
)
from app.services.planning import NO_GPU, Planned, Wish, plan_wish, require_fit
from app.services.quotas import require_queue
from app.services.result_cache import result_key, reuse_result
from app.services.retention import read_retention
from app.settings import Settings
from app.spec.compression import CompressionSpec
from app.storage import get_store
from app.storage.references import discard_unreferenced
from app.tracing import current_traceparent


@dataclass(frozen=True)
class Submission:
    """A job to be made."""

    wish: Wish
    name: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    priority: Priority = "normal"
    use_cache: bool = True
    """Whether the result of an earlier job that did the same will do."""


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows; everything given must hold."""

    status: str | None = None
    model_id: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


def submit_job(session: Session, settings: Settings, submission: Submission) -> JobView:
    """Write down a job with its stages and first event; its message goes out once that is committed.

    One that an earlier result will do for ends at once, and needs neither a worker nor a place in the queue.

    Raises what `plan_wish`, `reuse_result`, `require_fit` and `require_queue` raise, before anything is written.
    """
    planned = plan_wish(session, submission.wish)
    job = _new_job(planned, settings, submission)
    job.result_key = result_key(session, planned)
    if submission.use_cache and reuse_result(session, job, planned.spec.stage_names()):
        session.refresh(job)
        return _view(session, job)
    require_fit(planned)
    require_queue(session)
    if job.queue == "gpu" and not worker_queries.list_serving(session, job.queue):
        job.warnings = [NO_GPU]
    job_moves.create_job(session, job, planned.spec.stage_names())
    _send_after_commit(session, job)
    session.refresh(job)
    return _view(session, job)


def read_jobs(session: Session, job_ids: Sequence[str]) -> list[JobView]:
    """Those of these jobs that there are."""
    return _views(session, job_queries.get_jobs(session, job_ids))


def list_jobs(
    session: Session, wanted: JobFilter, *, limit: int, after: str | None
) -> tuple[list[JobView], bool]:
    """A page of jobs, newest first, and whether there are more."""
    jobs = job_queries.list_jobs(
        session,
        status=wanted.status,
        model_id=wanted.model_id,
        labels=wanted.labels,
        after=after,
        limit=limit + 1,
    )
    return _views(session, jobs[:limit]), len(jobs) > limit


def read_events(
    session: Session, job_id: str, *, after: int, limit: int
) -> tuple[list[EventView], bool, bool]:
    """Events above `after`; whether there are more; whether the job has ended, so that no more will come."""
    # First the status, then the events: an end that is seen is never without its event.
    ended = has_ended(require_job(session, job_id))
    events = job_queries.list_events(session, job_id, after=after, limit=limit + 1)
    return [event_view(event) for event in events[:limit]], len(events) > limit, ended


def cancel_job(session: Session, job_id: str) -> JobView:
    """Cancel a job: at once if it is queued, within about two seconds if it runs. Safe to repeat.

    Raises NotFound; Conflict when it has succeeded or failed.
    """
    job = require_job(session, job_id)
    if job.status == "queued" or not (job.cancel_requested or job.status == "cancelled"):
        status = job_moves.request_cancel(session, job_id)
        session.refresh(job)
        if status is None and job.status != "cancelled":
            raise Conflict(f"The job has already ended: {job.status}.", code="job_ended")
    return _view(session, job)


def keep_best(session: Session, job_id: str) -> JobView:
    """End a running job's training at its best state so far; the job goes on with that. Safe to repeat.

    Raises NotFound; Conflict when the job does not run, is being cancelled, or has no training ahead of it.
    """
    job = require_job(session, job_id)
    if job.cancel_requested or job.status != "running":
        status = shown_status(job)
        hint = "Cancel it without keep_best." if status == "queued" else None
        raise Conflict(f"There is nothing to keep: the job is {status}.", code="job_not_running", hint=hint)
    training = CompressionSpec.model_validate(job.spec).training_stages()
    if all(stage < job.stage for stage in training):
        raise Conflict(
            "The job has no training ahead of it that could end early.",
            code="nothing_to_train",
            hint="Wait for its end, or cancel it without keep_best.",
        )
    if not job.keep_best_requested:
        job_moves.request_best(session, job_id)
        session.refresh(job)
    return _view(session, job)


def retry_job(session: Session, job_id: str) -> JobView:
    """Queue a failed or cancelled job again; stages already committed are not repeated.

    Raises NotFound; Conflict in any other state, or when its model is gone; TooManyRequests.
    """
    job = require_job(session, job_id)
    if (deleted := _deleted_input(session, job)) is not None:
        raise Conflict(
            f"The {deleted} of this job has been deleted.",
            code="input_deleted",
            hint=f"Upload the {deleted} again and post a new job.",
        )
    # Asked before the quota, whose lock on the tenant must not wait for a worker that starts the job.
    if job.status not in ("failed", "cancelled"):
        raise _not_retryable(job)
    require_queue(session)
    if not job_moves.retry_job(session, job_id):
        raise _not_retryable(job)
    _send_after_commit(session, job)
    session.refresh(job)
    return _view(session, job)


def _deleted_input(session: Session, job: Job) -> str | None:
    """What a job would need and is not there any more; what is there is held until the transaction ends."""
    if model_queries.get_model_for_use(session, job.model_id) is None:
        return "model"
    spec = CompressionSpec.model_validate(job.spec)
    student = spec.student_model_id()
    if student is not None and model_queries.get_model_for_use(session, student) is None:
        return "student"
    found = (model_queries.get_dataset_for_use(session, dataset) for dataset in sorted(spec.dataset_ids()))
    return "dataset" if any(dataset is None for dataset in found) else None


def delete_job(session: Session, job_id: str) -> None:
    """Delete a job that has ended, with its artifacts and those of their blobs nobody else refers to.

    Raises NotFound; Conflict while it lives.
    """
    require_job(session, job_id)
    digests = [artifact.sha256 for artifact in job_queries.list_artifacts(session, job_id)]
    if not job_moves.delete_job(session, job_id):
        raise Conflict("The job has not ended.", code="job_not_ended", hint="Cancel it first.")
    after_commit(session, lambda: _remove_blobs(digests))


def read_result(session: Session, job_id: str) -> tuple[JobView, Sequence[Artifact]]:
    """A job that has succeeded, with its artifacts.

    Raises NotFound until it ends; JobFailed when it failed or was cancelled.
    """
    job = require_job(session, job_id)
    if not has_ended(job):
        raise NotFound(
            f"The job has no result yet: it is {job.status}.",
            code="result_not_ready",
            hint="Ask again when it has ended, or follow its events.",
        )
    if job.status == "cancelled":
        raise JobFailed("The job was cancelled.", code="job_cancelled", hint="POST …/retry runs it again.")
    if job.status == "failed":
        error = job.error or {}
        raise JobFailed(
            f"The job failed: {error.get('detail', 'no reason was recorded')}",
            code=error.get("code"),
            hint=error.get("hint"),
        )
    artifacts = job_queries.list_artifacts(session, job_id)
    return _view(session, job, artifacts), artifacts


def read_report(session: Session, job_id: str, *, html: bool) -> Artifact:
    """The artifact that holds a job's report. Raises NotFound before there is one."""
    job = require_job(session, job_id)
    kind = "report_html" if html else "report"
    for artifact in job_queries.list_artifacts(session, job_id):
        if artifact.kind == kind:
            return artifact
    raise NotFound(
        f"The job has no report: it is {job.status}.",
        code="report_not_ready",
        hint="A report is written when a job has succeeded.",
    )


def require_job(session: Session, job_id: str) -> Job:
    """A job by id. Raises NotFound."""
    job = job_queries.get_job(session, job_id)
    if job is None:
        raise no_job(job_id)
    return job


def no_job(job_id: str) -> NotFound:
    """That there is none of this id."""
    return NotFound(f"There is no job {job_id}.", hint="GET /v1/jobs lists those there are.")


def _not_retryable(job: Job) -> Conflict:
    return Conflict(
        f"Only failed and cancelled jobs can be retried; this one is {job.status}.",
        code="job_not_retryable",
        hint="To run it once more, post a new job with the same spec.",
    )


def _new_job(planned: Planned, settings: Settings, submission: Submission) -> Job:
    name = {NAME_LABEL: submission.name} if submission.name else {}
    return Job(
        id=new_id("job"),
        model_id=planned.model.id,
        model_name=planned.model.name,
        spec=planned.spec.model_dump(mode="json"),
        technique="+".join(step.technique for step in planned.spec.steps),
        recipe=planned.recipe,
        labels=submission.labels | name,
        queue=planned.queue,
        memory_bytes=planned.least_memory_bytes,
        priority=PRIORITIES.index(submission.priority),
        max_attempts=settings.max_attempts,
        traceparent=current_traceparent(),
        warnings=[],
    )


def _send_after_commit(session: Session, job: Job) -> None:
    """The row is the outbox: when the broker is away, the job is accepted all the same and the sweeper sends it."""
    job_id, queue = job.id, job.queue
    job_moves.mark_dispatched(session, job_id)
    after_commit(session, lambda: _send(job_id, queue))


def _send(job_id: str, queue: str) -> None:
    # Celery takes longer to import than all the rest of the API.
    from app.queue import enqueue_job

    if not enqueue_job(job_id, queue):
        with get_database().write() as session:
            job_moves.forget_dispatch(session, [job_id])


def _remove_blobs(digests: list[str]) -> None:
    discard_unreferenced(get_database(), get_store(), digests)


def _view(session: Session, job: Job, artifacts: Sequence[Artifact] | None = None) -> JobView:
    if artifacts is None:
        artifacts = job_queries.list_artifacts(session, job.id)
    days = read_retention(session).artifact_days if artifacts else 0
    return job_view(job, job_queries.list_stages(session, job.id), artifacts, artifact_days=days)


def _views(session: Session, jobs: Sequence[Job]) -> list[JobView]:
    stages = job_queries.stages_of(session, [job.id for job in jobs])
    # Rows of artifacts come with the end of their job.
    ended = [job.id for job in jobs if has_ended(job)]
    artifacts = job_queries.artifacts_of(session, ended) if ended else {}
    days = read_retention(session).artifact_days if artifacts else 0
    return [
        job_view(job, stages.get(job.id, ()), artifacts.get(job.id, ()), artifact_days=days) for job in jobs
    ]
