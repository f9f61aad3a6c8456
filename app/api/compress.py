"""A model file and what to do with it in one form: for people with curl."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from app.api.bodies import FileName
from app.api.dependencies import CurrentStores
from app.api.idempotency import IdempotentRoute
from app.api.jobs import JobRequest
from app.api.problems import problem_responses
from app.api.routing import refuse_unknown_fields
from app.services import jobs, models
from app.services.job_view import JobView
from app.services.models import Stores
from app.services.planning import find_recipe

router = APIRouter(prefix="/compress", tags=["compress"], route_class=IdempotentRoute)

_CHUNK_BYTES = 2**20
_FILE_NAME: TypeAdapter[str] = TypeAdapter(FileName)
# The form names no model: its place in the job's body is filled before the model exists, so that a spec with faults
# is refused before the file is read.
_NO_MODEL = "mdl_0"


@router.post(
    "",
    operation_id="compress",
    status_code=202,
    summary="Compress a file",
    dependencies=[Depends(refuse_unknown_fields)],
    responses={
        202: {"headers": {"Location": {"description": "The job.", "schema": {"type": "string"}}}},
        **problem_responses(404, 409, 507),
    },
)
async def compress(
    stores: CurrentStores,
    response: Response,
    *,
    file: Annotated[
        UploadFile, File(description="A zip or tar of a Hugging Face directory, or a GGUF file.")
    ],
    recipe: Annotated[
        str | None, Form(description="Name of a recipe. Give this or `spec`.", examples=["int8"])
    ] = None,
    spec: Annotated[
        str | None, Form(description="A spec as JSON. Give this or `recipe`.", examples=[""])
    ] = None,
    name: Annotated[str | None, Form(description="What to call the job.", examples=["my model"])] = None,
    use_cache: Annotated[
        bool, Form(description="False: run the job even if an earlier one of yours did the same.")
    ] = True,
) -> JobView:
    """Make a model of the file and start a job on it; the answer is that of `POST /v1/jobs`.

    `curl -F file=@model.zip -F recipe=int8 http://localhost:8000/v1/compress`. When the job is refused, the model is
    not kept. Files over 100 MB go up in parts (`POST /v1/uploads`).
    """
    body = _job_request({"recipe": recipe, "spec": spec, "name": name})
    body = body.model_copy(update={"use_cache": use_cache})
    if body.recipe is not None:
        find_recipe(body.recipe)
    state = await models.create_from_body(
        stores, _chunks(file), file_name=_file_name(file.filename or "model"), sha256=None
    )
    try:
        job = await run_in_threadpool(_submit, stores, body, state.model.id)
    except BaseException:
        await run_in_threadpool(_drop_model, stores, state.model.id)
        raise
    response.headers["Location"] = job.urls.self
    return job


def _job_request(fields: dict[str, str | None]) -> JobRequest:
    """The body of a job with these fields; an empty one is as none, since a browser's form sends all. Raises RequestValidationError with pointers into the spec."""
    body: dict[str, Any] = {"model": _NO_MODEL} | {k: v for k, v in fields.items() if v}
    try:
        if "spec" in body:
            body["spec"] = _parsed(body["spec"])
        return JobRequest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults, body=body) from error


def _parsed(spec: str) -> Any:
    """A spec from its JSON. Raises RequestValidationError."""
    try:
        return json.loads(spec)
    except json.JSONDecodeError as error:
        position, reason = error.pos, error.msg
    except (ValueError, RecursionError):
        position, reason = 0, "It is nested too deeply, or has a number of too many digits,"
    fault = {"type": "json_invalid", "loc": ("body", position), "msg": "", "ctx": {"error": reason}}
    raise RequestValidationError([fault], body=spec)


def _file_name(name: str) -> str:
    """The name as POST /v1/uploads would take it. Raises RequestValidationError."""
    try:
        return _FILE_NAME.validate_python(name)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", "file")} for fault in error.errors()]
        raise RequestValidationError(faults, body={"file": name}) from error


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(_CHUNK_BYTES):
        yield chunk


def _submit(stores: Stores, body: JobRequest, model_id: str) -> JobView:
    submission = body.model_copy(update={"model": model_id}).submission()
    with stores.database.write() as session:
        return jobs.submit_job(session, stores.settings, submission)


def _drop_model(stores: Stores, model_id: str) -> None:
    with stores.database.write() as session:
        models.delete_model(session, stores, model_id)
