"""The catalogue: what can be done, with which recipes, into which formats, by which workers."""

from __future__ import annotations

import inspect
from datetime import datetime
from functools import cache
from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field, TypeAdapter

from app.api.dependencies import ReadSession
from app.db import worker_queries
from app.services.job_view import as_time
from app.spec.base import Family, Format, Step
from app.spec.compression import STEP_CLASSES, CompressionSpec
from app.spec.documented import Documented
from app.spec.export import FORMATS
from app.spec.recipes import RECIPES

router = APIRouter(tags=["catalogue"])


class Technique(Documented):
    """One step that a spec may contain."""

    name: str = Field(examples=["quantize.weights"])
    """What to write in the step's `technique`."""
    summary: str
    description: str
    families: list[Family]
    """Kinds of models it works on."""
    needs_calibration: bool
    """Whether it runs the model over the spec's `calibration` text."""
    needs_training: bool
    """Whether it trains on the spec's `training` text."""
    produces: Format
    """What it writes. Only after `safetensors` can another step follow."""
    parameters: dict[str, Any]
    """JSON Schema of the step: every field with its default, bounds and unit."""


class RecipeView(Documented):
    """A spec with a name, for people who know their target, not the literature."""

    name: str = Field(examples=["int8"])
    summary: str
    reason: str
    """When to choose it, and what it costs."""
    families: list[Family]
    spec: CompressionSpec


class FormatView(Documented):
    """A format a result can have."""

    name: Format
    summary: str
    runtimes: list[str]
    """What loads it."""
    techniques: list[str]
    """Techniques that write it."""


class WorkerView(Documented):
    """A worker that has announced itself in the last minute."""

    id: str
    queues: list[str]
    hardware: dict[str, Any]
    """`processor`, `threads`, `memory_bytes` that one job may use, `gpus` by name."""
    sandbox: str
    """How the processes of jobs are confined."""
    started_at: datetime
    seen_at: datetime


@router.get(
    "/techniques", operation_id="list_techniques", response_model=list[Technique], summary="List techniques"
)
def list_techniques() -> Response:
    """Every step a spec may contain, with the JSON Schema of its parameters."""
    return Response(_techniques(), media_type="application/json")


@router.get("/recipes", operation_id="list_recipes", summary="List recipes")
def list_recipes() -> list[RecipeView]:
    """Named presets. Take one as it is (`recipe` of a job), or its `spec` as the start of your own."""
    return [
        RecipeView(name=r.name, summary=r.summary, reason=r.reason, families=sorted(r.families), spec=r.spec)
        for r in RECIPES.values()
    ]


@router.get("/formats", operation_id="list_formats", summary="List formats")
def list_formats() -> list[FormatView]:
    """The formats results are written in, and what loads them."""
    return [
        FormatView(
            name=name,
            summary=about.summary,
            runtimes=list(about.runtimes),
            techniques=[_technique(s).name for s in STEP_CLASSES if name in {s.produces, *s.also_produces}],
        )
        for name, about in FORMATS.items()
    ]


@router.get("/workers", operation_id="list_workers", summary="List workers")
def list_workers(session: ReadSession) -> list[WorkerView]:
    """Workers that have been seen in the last minute, their hardware and the queues they take jobs from."""
    return [
        WorkerView(
            id=worker.id,
            queues=worker.queues.split(","),
            hardware=worker.hardware,
            sandbox=worker.sandbox,
            started_at=as_time(worker.started_at),
            seen_at=as_time(worker.seen_at),
        )
        for worker in worker_queries.list_fresh(session)
    ]


@cache
def _techniques() -> bytes:
    """Milliseconds of making schemas, which are the same for as long as the process lives."""
    return TypeAdapter(list[Technique]).dump_json([_technique(step) for step in STEP_CLASSES])


def _technique(step: type[Step]) -> Technique:
    description = inspect.cleandoc(step.__doc__ or "")
    return Technique(
        name=step.model_fields["technique"].default,
        summary=description.split("\n", maxsplit=1)[0],
        description=description,
        families=sorted(step.families),
        needs_calibration=step.needs_calibration,
        needs_training=step.needs_training,
        produces=step.produces,
        parameters=step.model_json_schema(),
    )
