"""The typed events a job's process sends up its pipe, one JSON object a line, and nothing else crosses it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from app.errors import JobFailed
from app.spec.report import Verdict

_MAX_WORDS = 4000
# What a job's process says is kept and shown, so none of it may be without end, or a number that JSON does not have.
Name = Annotated[str, Field(max_length=200)]
Words = Annotated[str, AfterValidator(lambda words: words[:_MAX_WORDS])]
Figure = Annotated[
    float, Field(allow_inf_nan=True), AfterValidator(lambda value: value if math.isfinite(value) else None)
]
"""A training may diverge: what is no number is kept as null."""
Metrics = Annotated[
    dict[Name, bool | int | Figure | Annotated[str, Field(max_length=500)] | None], Field(max_length=200)
]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProcessStarted(_Event):
    """The process runs; torch is not imported yet."""

    type: Literal["process"] = "process"
    pid: int


class EngineReady(_Event):
    """Torch is imported: the work begins."""

    type: Literal["ready"] = "ready"
    seconds: float
    """Since the process started."""
    torch: Name


class StageStarted(_Event):
    """A stage begins."""

    type: Literal["stage_started"] = "stage_started"
    stage: Annotated[int, Field(ge=0)]
    name: Name


class StageDone(_Event):
    """A stage's files are on disk, synced, and may be committed."""

    type: Literal["stage_done"] = "stage_done"
    stage: Annotated[int, Field(ge=0)]
    directory: Annotated[str, Field(pattern=r"^\d+-\d+$")]
    metrics: Metrics


class Progress(_Event):
    """How far a stage is."""

    type: Literal["progress"] = "progress"
    stage: Annotated[int, Field(ge=0)]
    fraction: Annotated[float, Field(ge=0, le=1)]
    message: Annotated[str, Field(max_length=500)]


class Metric(_Event):
    """A number worth seeing before the report is there."""

    type: Literal["metric"] = "metric"
    stage: Annotated[int, Field(ge=0)]
    name: Name
    value: float


class Log(_Event):
    """A line for whoever watches."""

    type: Literal["log"] = "log"
    level: Literal["info", "warning"]
    message: Annotated[str, Field(max_length=2000)]


class Warning(_Event):  # noqa: A001 - the event is called that
    """Something the user must know; also kept on the job."""

    type: Literal["warning"] = "warning"
    message: Annotated[str, Field(max_length=2000)]


class Finished(_Event):
    """All stages are done."""

    type: Literal["finished"] = "finished"
    verdict: Verdict


class Failed(_Event):
    """The job cannot be done; an error a user can act on."""

    type: Literal["failed"] = "failed"
    code: Name
    detail: Words
    hint: Words | None = None
    stage: Name | None = None
    retryable: bool = False


Event = (
    ProcessStarted
    | EngineReady
    | StageStarted
    | StageDone
    | Progress
    | Metric
    | Log
    | Warning
    | Finished
    | Failed
)
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def parse_event(line: bytes) -> Event:
    """Read one line from the pipe. Raises JobFailed for anything that is no event."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        raise JobFailed(
            "The job's process sent something that is no event; it may have been tampered with.",
            code="protocol",
        ) from error
