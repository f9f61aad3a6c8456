"""Jobs: submit, follow, stop, and fetch what they leave."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from app.api.bodies import RANGE_ANSWERS
from app.api.dependencies import (
    After,
    Caller,
    CurrentSettings,
    Limit,
    Page,
    ReadSession,
    WriteSession,
    database_of,
)
from app.api.events import event_stream, wants_event_stream
from app.api.idempotency import IdempotentRoute
from app.api.job_reads import job_reads
from app.api.problems import problem_responses
from app.api.request_body import RequestBody
from app.api.streams import BlobResponse, tar_response
from app.api.texts import LabelFilter, LabelName, LabelValue, Name
from app.services import jobs
from app.services.artifacts import require_content
from app.services.job_view import ArtifactView, EventView, JobStatus, JobView, Priority
from app.services.jobs import JobFilter, Submission
from app.services.planning import Wish
from app.spec.compression import CompressionSpec
from app.spec.documented import Documented
from app.spec.recipes import RecipeDatasets
from app.spec.report import Report, Verdict

# What a database has for a number.
_LAST_NUMBER = 2**63 - 1

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=IdempotentRoute)

JobId = Annotated[str, Path(pattern=r"^job_[0-9a-z]{1,40}$", description="Id of the job.")]

_RECIPE_EXAMPLE: JsonDict = {"model": "mdl_01k0b6x2v9m4c8d7e5f3g1h0j2", "recipe": "int8"}
_SPEC_EXAMPLE: JsonDict = {
    "model": "mdl_01k0b6x2v9m4c8d7e5f3g1h0j2",
    "spec": {
        "steps": [{"technique": "quantize.weights", "bits": 4, "group_size": 32, "symmetric": False}],
        "acceptance": {"max_bytes_ratio": 0.6},
    },
    "labels": {"team": "search"},
}


class PlanRequest(RequestBody):
    """A model, and what to do to it: either the name of a recipe or a spec of your own."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [_RECIPE_EXAMPLE, _SPEC_EXAMPLE]},
    )

    model: Annotated[str, Field(pattern=r"^mdl_[0-9a-z]+$")]
    """Id of the model to compress."""
    recipe: str | None = None
    """Name of a recipe (`GET /v1/recipes`). Give this or `spec`."""
    datasets: RecipeDatasets | None = None
    """What a recipe works on in place of the text that ships with Modelpress. A spec names its own."""
    spec: CompressionSpec | None = None
    """What to do, in full (`GET /v1/techniques` lists the steps there are). Give this or `recipe`."""

    @model_validator(mode="after")
    def _one_of_the_two(self) -> PlanRequest:
        if (self.recipe is None) == (self.spec is None):
            raise ValueError('give either "recipe" (a name) or "spec" (an object), and not both')
        if self.datasets is not None and self.recipe is None:
            raise ValueError(
                "datasets are for a recipe: a spec names them in calibration, training and evaluation"
            )
        return self

    def wish(self) -> Wish:
        """What the services are asked for."""
        return Wish(self.model, self.recipe, self.spec, self.datasets)


class CancelRequest(RequestBody):
    """How to stop a job."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"keep_best": False}]})

    keep_best: bool = False
    """End the training alone, and let the job go on with the best state so far. 409 where nothing is left to train."""


class JobRequest(PlanRequest):
    """A job to run."""

    name: Name | None = None
    """What to call it; for people."""
    labels: Annotated[dict[LabelName, LabelValue], Field(max_length=32)] = Field(default_factory=dict)
    """Words of your own to find it by (`GET /v1/jobs?label=team:search`)."""
    priority: Priority = "normal"
    """Which of your jobs are started first. Between tenants workers are shared evenly, whatever this says."""
    use_cache: bool = True
    """Whether the result of an earlier job of yours will do that was the same in model, spec, data and version. The job then
    ends at once and says so in `result_of`. False: run it, e.g. to measure again."""

    def submission(self) -> Submission:
        """What the services are asked for."""
        return Submission(self.wish(), self.name, dict(self.labels), self.priority, self.use_cache)


class JobResult(Documented):
    """What a job that succeeded left."""

    job: str
    verdict: Verdict
    """`rejected` means that a limit of the spec was missed: see the report. The files are there all the same."""
    result_of: str | None = Field(examples=[None])
    """Id of the earlier job whose result this is, if nothing was run for this one; its report names that job."""
    bytes: int
    """Of all files of the result, reports not counted."""
    artifacts: list[ArtifactView]
    download: str
    """All files in one tar."""
    report: str


@router.post(
    "",
    operation_id="create_job",
    status_code=202,
    summary="Start a job",
    responses={
        202: {"headers": {"Location": {"description": "The job.", "schema": {"type": "string"}}}},
        **problem_responses(404, 409),
    },
)
def create_job(
    body: JobRequest, session: WriteSession, settings: CurrentSettings, response: Response
) -> JobView:
    """Check the spec to its last field and against the model, and queue a job.

    Everything that can be known to fail is refused now, with the place of every fault in the spec. The answer comes
    at once; follow the job with its `events`, or ask for it again. Where an earlier job of yours did the same, this one
    has its result at once: `status` is `succeeded` and `result_of` names that job, unless `use_cache` is false.
    """
    job = jobs.submit_job(session, settings, body.submission())
    response.headers["Location"] = job.urls.self
    return job


@router.get("", operation_id="list_jobs", summary="List jobs")
def list_jobs(
    session: ReadSession,
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status.")] = None,
    model: Annotated[
        str | None,
        Query(pattern=r"^mdl_[0-9a-z]{1,40}$", description="Only jobs on the model with this id."),
    ] = None,
    label: Annotated[
        list[LabelFilter] | None,
        Query(description="Only jobs with this label, as `name:value`; several must all hold."),
    ] = None,
    limit: Limit = 20,
    after: After = None,
) -> Page[JobView]:
    """Jobs, newest first, each with its stages and artifacts."""
    wanted = JobFilter(status=status, model_id=model, labels=dict(map(_split_label, label or ())))
    items, has_more = jobs.list_jobs(session, wanted, limit=limit, after=after)
    return Page(items=items, has_more=has_more)


@router.get(
    "/{job_id}",
    operation_id="get_job",
    response_model=JobView,
    summary="See a job",
    responses=problem_responses(404),
)
async def get_job(job_id: JobId, caller: Caller) -> Response:
    """A job with its stages, progress, and once it has ended, its artifacts or its error."""
    found = await job_reads().ask((caller.tenant, job_id))
    if found is None:
        raise jobs.no_job(job_id)
    return Response(found, media_type="application/json")


@router.get(
    "/{job_id}/events",
    operation_id="list_job_events",
    summary="Follow a job",
    response_model=Page[EventView],
    responses={
        200: {
            "description": "A page of events; or, with `Accept: text/event-stream`, all of them as they happen.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problem_responses(404),
    },
)
def list_job_events(
    job_id: JobId,
    request: Request,
    session: ReadSession,
    after: Annotated[int, Query(ge=0, le=_LAST_NUMBER, description="Number of the last event you have.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many to return at most.")] = 200,
    last_event_id: Annotated[
        int | None,
        Header(
            ge=0,
            le=_LAST_NUMBER,
            description="As `after`, for streams: browsers send it when they connect again.",
        ),
    ] = None,
) -> Any:
    """Everything that happened to a job, oldest first, numbered without gaps.

    As a page: ask again with `after` set to the last number. As a stream (`Accept: text/event-stream`): first what has
    happened, then what happens, until the job has ended. A stream that broke goes on with `Last-Event-ID`.
    """
    if wants_event_stream(request):
        jobs.require_job(session, job_id)
        return event_stream(
            database_of(request), job_id, after=after if last_event_id is None else last_event_id
        )
    events, has_more, _ = jobs.read_events(session, job_id, after=after, limit=limit)
    return Page(items=events, has_more=has_more)


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_job",
    summary="Cancel a job",
    responses=problem_responses(404, 409),
)
def cancel_job(job_id: JobId, session: WriteSession, how: CancelRequest | None = None) -> JobView:
    """Stop a job: one that waits at once, one that runs within about two seconds. Safe to repeat.

    With `keep_best`, stop its training alone: the best state so far is what the rest of the job works on, and the job
    ends `succeeded`, with `stopped_by: request` in its report. A plain cancel afterwards still ends it `cancelled`.
    """
    if how is not None and how.keep_best:
        return jobs.keep_best(session, job_id)
    return jobs.cancel_job(session, job_id)


@router.post(
    "/{job_id}/retry",
    operation_id="retry_job",
    status_code=202,
    summary="Run a job again",
    responses=problem_responses(404, 409),
)
def retry_job(job_id: JobId, session: WriteSession, response: Response) -> JobView:
    """Queue a job that failed or was cancelled again. Stages that are done are not repeated."""
    job = jobs.retry_job(session, job_id)
    response.headers["Location"] = job.urls.self
    return job


@router.get(
    "/{job_id}/report",
    operation_id="get_job_report",
    summary="Read the report",
    response_class=FileResponse,
    responses={
        200: {
            "model": Report,
            "description": "What was gained and what was lost. With `Accept: text/html`, a page to read.",
            "content": {"text/html": {"schema": {"type": "string"}}},
        },
        **RANGE_ANSWERS,
        **problem_responses(404, 416),
    },
)
def get_job_report(job_id: JobId, request: Request, session: ReadSession) -> BlobResponse:
    """The report of a job that has succeeded: sizes, quality, latency and memory of original and result."""
    html = _prefers_html(request.headers.get("accept", ""))
    artifact = jobs.read_report(session, job_id, html=html)
    return BlobResponse(artifact, request.method, inline=True, varies=True)


@router.get(
    "/{job_id}/result",
    operation_id="get_job_result",
    summary="Get the result",
    responses=problem_responses(404, 409),
)
def get_job_result(job_id: JobId, session: ReadSession) -> JobResult:
    """Links to the files of a job that has succeeded. 404 until it ends, 409 if it failed or was cancelled."""
    job, artifacts = jobs.read_result(session, job_id)
    return JobResult(
        job=job.id,
        verdict=job.verdict or "unmeasured",
        result_of=job.result_of,
        bytes=sum(a.bytes for a in artifacts if a.kind == "model"),
        artifacts=job.artifacts,
        download=job.urls.download,
        report=job.urls.report,
    )


@router.get(
    "/{job_id}/download",
    operation_id="download_job_result",
    summary="Download all files",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "An uncompressed tar of the result's files and its reports, in one directory.",
            "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problem_responses(404, 409, 410),
    },
)
def download_job_result(job_id: JobId, session: ReadSession) -> StreamingResponse:
    """The whole result as one tar. For single files, and to resume, use `artifacts`."""
    job, artifacts = jobs.read_result(session, job_id)
    require_content(session, artifacts)
    ended = job.ended_at or job.created_at
    return tar_response(artifacts, root=job.id, mtime=ended.timestamp())


@router.delete(
    "/{job_id}",
    operation_id="delete_job",
    status_code=204,
    summary="Delete a job",
    responses=problem_responses(404, 409),
)
def delete_job(job_id: JobId, session: WriteSession) -> None:
    """Remove a job that has ended, with its artifacts, reports and events. A job that lives must be cancelled first."""
    jobs.delete_job(session, job_id)


def _split_label(label: str) -> tuple[str, str]:
    name, _, value = label.partition(":")
    return name, value


def _prefers_html(accept: str) -> bool:
    """A browser asks for text/html first; clients of an API for JSON or anything."""
    media_types = [part.split(";")[0].strip() for part in accept.split(",")]
    json_at = media_types.index("application/json") if "application/json" in media_types else len(media_types)
    return "text/html" in media_types[:json_at]
