"""A job as the API shows it: one fixed envelope, with everything a client needs to follow it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, cast
from urllib.parse import quote

from pydantic import ConfigDict, Field

from app.db.job_queries import TERMINAL
from app.db.tables import Artifact, Job, JobEvent, JobStage
from app.settings import get_settings
from app.spec.compression import CompressionSpec
from app.spec.documented import Documented
from app.spec.report import Verdict

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
"""In the order in which jobs of a tenant are started; rows have the place."""
JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class View(Documented):
    """A part of an answer; docstrings under fields become their descriptions in OpenAPI."""

    model_config = ConfigDict(frozen=True)


class StageView(View):
    """One stage of a job. A stage that is done is never run twice in effect."""

    name: str = Field(examples=["step 1: quantize.weights"])
    status: Literal["pending", "running", "stopped", "done"]
    """`stopped`: it ran when its worker was lost, or the job failed or was cancelled; it starts anew if the job goes on."""
    progress: float
    """0 to 1."""
    started_at: datetime | None
    ended_at: datetime | None
    metrics: dict[str, Any]
    """What the stage measured: `seconds`, `peak_memory_bytes`, and figures of its technique."""


class Durations(View):
    """Seconds, up to now while the job lives."""

    queued: float
    """Waiting for a worker."""
    running: float | None
    """Since a worker first took it."""
    total: float


class JobError(View):
    """Why a job failed, or why its last try did."""

    code: str
    detail: str
    hint: str | None = None
    stage: str | None = None


class ArtifactUrls(View):
    """Links of an artifact."""

    self: str
    content: str


class ArtifactView(View):
    """A file that a job left."""

    id: str = Field(examples=["art_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    job: str
    kind: Literal["model", "report", "report_html"]
    """`model`: a file of the result. `report`: JSON. `report_html`: the same to read."""
    path: str = Field(examples=["model.safetensors"])
    """Name within the result, with `/` between directories."""
    media_type: str
    bytes: int
    sha256: str
    """In hex; also the ETag of the content."""
    created_at: datetime
    expired_at: datetime | None
    """When its bytes were given up, and from when on its content is 410 `artifact_expired`; null: they are there."""
    urls: ArtifactUrls


class JobUrls(View):
    """Links of a job."""

    self: str
    events: str
    cancel: str
    retry: str
    report: str
    result: str
    download: str


class JobView(View):
    """A compression job."""

    id: str = Field(examples=["job_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    name: str | None
    """What you called it."""
    status: JobStatus
    """`queued → running → succeeded | failed | cancelled`; `cancelling` while a cancel is on its way."""
    verdict: Verdict | None
    """Once it has succeeded: `accepted`, `rejected` (a limit of the spec was missed; the result is there all the same)
    or `unmeasured`."""
    result_of: str | None = Field(examples=[None])
    """Id of the earlier job of yours whose result this is: it was the same in model, spec, data and version, so nothing was
    run for this one (see `use_cache`). It may have been deleted since. Null: this job was run, or will be."""
    model: str
    """Id of the model it works on."""
    model_name: str
    recipe: str | None
    spec: CompressionSpec
    """The spec as it is run, every default written out."""
    stages: list[StageView]
    progress: float
    """0 to 1, over all stages."""
    eta_seconds: float | None
    queue: str
    memory_bytes: int | None = Field(examples=[1288490188])
    """The least memory it was predicted to need: a worker with less leaves it to others."""
    priority: Priority
    attempt: int
    """Which try this is, from 1; 0 before the first."""
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    durations: Durations
    error: JobError | None
    warnings: list[str]
    artifacts: list[ArtifactView]
    expires_at: datetime | None
    """When the files of its result will be given up, unless a model or dataset of yours consists of them; reports stay.
    Null: they are kept for ever, or there are none, or they are gone."""
    expired_at: datetime | None
    """When the last of them went that has gone."""
    labels: dict[str, str]
    urls: JobUrls


class EventView(View):
    """Something that happened to a job."""

    number: int
    """1, 2, 3 … for each job, without gaps."""
    type: str
    """`status`, `process`, `ready`, `stage`, `progress`, `metric`, `log` or `warning`."""
    data: dict[str, Any]
    created_at: datetime


def job_view(
    job: Job, stages: Sequence[JobStage], artifacts: Sequence[Artifact], *, artifact_days: int
) -> JobView:
    """A job with its stages and artifacts, which are kept for so many days; 0: for ever."""
    labels = dict(job.labels)
    expired_at = max((a.expired_at for a in artifacts if a.expired_at is not None), default=None)
    return JobView(
        id=job.id,
        name=labels.pop(NAME_LABEL, None),
        status=shown_status(job),
        verdict=job.verdict,
        result_of=job.result_of,
        model=job.model_id,
        model_name=job.model_name,
        recipe=job.recipe,
        spec=CompressionSpec.model_validate(job.spec),
        stages=[_stage(stage, is_running=job.status == "running") for stage in stages],
        progress=round(job.progress, 4),
        eta_seconds=None if job.eta_seconds is None else round(job.eta_seconds, 1),
        queue=job.queue,
        memory_bytes=job.memory_bytes,
        priority=PRIORITIES[job.priority],
        attempt=job.attempt,
        created_at=as_time(job.created_at),
        queued_at=as_time(job.queued_at),
        started_at=_maybe(job.started_at),
        ended_at=_maybe(job.ended_at),
        durations=_durations(job, time.time()),
        error=None if job.error is None else JobError.model_validate(job.error),
        warnings=job.warnings,
        artifacts=[artifact_view(artifact) for artifact in artifacts],
        expires_at=_expiry(artifacts, artifact_days) if expired_at is None else None,
        expired_at=_maybe(expired_at),
        labels=labels,
        urls=_job_urls(job.id),
    )


NAME_LABEL = "modelpress.name"
"""Label that keeps a job's name."""


def artifact_view(artifact: Artifact) -> ArtifactView:
    """An artifact with its links."""
    url = link(f"/artifacts/{artifact.id}")
    return ArtifactView(
        id=artifact.id,
        job=artifact.job_id,
        kind=artifact.kind,
        path=artifact.path,
        media_type=artifact.media_type,
        bytes=artifact.bytes,
        sha256=artifact.sha256,
        created_at=as_time(artifact.created_at),
        expired_at=_maybe(artifact.expired_at),
        urls=ArtifactUrls(self=url, content=f"{url}/content"),
    )


def event_view(event: JobEvent) -> EventView:
    """An event."""
    return EventView(
        number=event.number, type=event.type, data=event.data, created_at=as_time(event.created_at)
    )


def shown_status(job: Job) -> JobStatus:
    """The status with `cancelling`, which is a running job that has been asked to stop."""
    if job.status == "running" and job.cancel_requested:
        return "cancelling"
    return cast("JobStatus", job.status)


def has_ended(job: Job) -> bool:
    """Whether nothing will happen to the job any more, unless somebody retries it."""
    return job.status in TERMINAL


def link(path: str) -> str:
    """The URL of a path of the API, percent-encoded: relative, unless the settings name a public base."""
    return f"{get_settings().public_url.rstrip('/')}/v1{quote(path)}"


def as_time(seconds: float) -> datetime:
    """Seconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def _maybe(seconds: float | None) -> datetime | None:
    return None if seconds is None else as_time(seconds)


def _expiry(artifacts: Sequence[Artifact], days: int) -> datetime | None:
    """When the first file of the result is due."""
    made_at = [artifact.created_at for artifact in artifacts if artifact.kind == "model"]
    return as_time(min(made_at) + days * 86_400) if days and made_at else None


def _stage(stage: JobStage, *, is_running: bool) -> StageView:
    return StageView(
        name=stage.name,
        status="stopped" if stage.status == "running" and not is_running else stage.status,
        progress=stage.progress,
        started_at=_maybe(stage.started_at),
        ended_at=_maybe(stage.ended_at),
        metrics=stage.metrics,
    )


def _durations(job: Job, now: float) -> Durations:
    """A retried job is queued anew: what came before its last `queued_at` does not count."""
    end = max(job.queued_at, now if job.ended_at is None else job.ended_at)
    started = None if job.started_at is None else max(job.started_at, job.queued_at)
    return Durations(
        queued=round((end if started is None else started) - job.queued_at, 3),
        running=None if started is None else round(max(0.0, end - started), 3),
        total=round(end - job.queued_at, 3),
    )


def _job_urls(job_id: str) -> JobUrls:
    url = link(f"/jobs/{job_id}")
    names = ("events", "cancel", "retry", "report", "result", "download")
    return JobUrls(self=url, **{name: f"{url}/{name}" for name in names})
