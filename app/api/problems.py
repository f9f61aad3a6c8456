"""Every error as `application/problem+json` (RFC 9457): one place turns exceptions into answers."""

from __future__ import annotations

import http
import uuid
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.api.validation import validation_problem
from app.errors import Fault, ModelpressError
from app.spec.documented import Documented

MEDIA_TYPE = "application/problem+json"

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_RETRY_AFTER_SECONDS = {429: "30", 503: "5"}
_log = structlog.get_logger(__name__)


class ProblemFault(Documented):
    """One fault in a request."""

    pointer: str | None = None
    """Where in the body, as a JSON pointer (RFC 6901), e.g. `/spec/steps/0/bits`. Empty: the body as a whole."""
    parameter: str | None = None
    """For faults outside the body: where, e.g. `query/limit`, `header/Range`."""
    detail: str
    """What is wrong and what to do about it."""


class Problem(Documented):
    """What every error looks like (RFC 9457). `code` is stable; `detail` and `hint` are for people."""

    type: str = Field(examples=["urn:modelpress:problem:not_found"])
    """`urn:modelpress:problem:` and the code."""
    title: str = Field(examples=["Not found"])
    """The kind of error, the same for every occurrence."""
    status: int = Field(examples=[404])
    """The HTTP status."""
    code: str = Field(examples=["not_found"])
    """Stable, for programs to act on."""
    detail: str = Field(examples=["There is no job job_01jd3."])
    """What happened this time."""
    hint: str | None = None
    """What to do about it."""
    errors: list[ProblemFault] | None = None
    """Every fault of the request, where there is more to say than `detail`."""
    request_id: str | None = None
    """Also in the log of the service and in the `X-Request-Id` header: quote it when asking for help."""


class ProblemResponse(JSONResponse):
    """A JSON response with the media type of problems."""

    media_type = MEDIA_TYPE


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: the problems it answers with, for OpenAPI."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {s: {"description": http.HTTPStatus(s).phrase, "content": content} for s in sorted(statuses)}


def problem_body(error: ModelpressError) -> dict[str, Any]:
    """The members of a problem, without those that are empty."""
    return _body(
        status=error.status,
        title=error.title,
        code=error.code,
        detail=error.detail,
        hint=error.hint,
        errors=[_fault(fault) for fault in error.faults] or None,
    )


def render(error: ModelpressError, headers: Mapping[str, str] | None = None) -> ProblemResponse:
    """The response for an error of ours, with when to ask again where that may help."""
    wait = _RETRY_AFTER_SECONDS.get(error.status)
    return ProblemResponse(
        problem_body(error), error.status, {**({"Retry-After": wait} if wait else {}), **(headers or {})}
    )


def render_unexpected(error: Exception) -> ProblemResponse:
    """Log an error nobody foresaw under a fresh id; tell the client the id and nothing else."""
    error_id = uuid.uuid4().hex
    _log.error("unhandled_error", error_id=error_id, exc_info=error)
    body = _body(
        status=500,
        title=ModelpressError.title,
        code=ModelpressError.default_code,
        detail=f"Something went wrong on our side. The log has the details under error_id {error_id}.",
        hint="Look for this id in the log of the service and report it.",
    )
    return ProblemResponse(body | {"error_id": error_id}, 500)


def add_problem_handlers(app: FastAPI) -> None:
    """Register the handlers that turn exceptions into problems."""

    @app.exception_handler(ModelpressError)
    async def ours(_: Request, error: ModelpressError) -> ProblemResponse:
        return render(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> ProblemResponse:
        return render(validation_problem(error))

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> ProblemResponse:
        return _render_http(request, error)


def _render_http(request: Request, error: HTTPException) -> ProblemResponse:
    """Errors of the framework itself: an unknown path, a method that a path does not have, a broken form."""
    if isinstance(error.__cause__, ModelpressError):
        return render(error.__cause__)
    phrase = http.HTTPStatus(error.status_code).phrase
    headers = dict(error.headers or {})
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods_of(request))
    body = _body(
        status=error.status_code,
        title=phrase,
        code=phrase.lower().replace(" ", "_").replace("-", "_"),
        detail=_explain(request, error, headers, phrase),
        hint="See /docs for the paths and methods there are." if error.status_code in (404, 405) else None,
    )
    return ProblemResponse(body, error.status_code, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """Every method the path takes. Starlette's own `Allow` has those of the first route with this path alone."""
    return [method for method in _METHODS if _takes(request, method)]


def _takes(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


def _explain(request: Request, error: HTTPException, headers: Mapping[str, str], phrase: str) -> str:
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        return f"There is nothing at {request.url.path}."
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        return f"{request.url.path} does not take {request.method}, but {headers['Allow']}."
    return str(error.detail or phrase)


def _body(*, status: int, title: str, code: str, detail: str, **more: Any) -> dict[str, Any]:
    members = {"type": f"urn:modelpress:problem:{code}", "title": title, "status": status, "code": code}
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    optional = more | {"request_id": request_id}
    return members | {"detail": detail} | {k: v for k, v in optional.items() if v is not None}


def _fault(fault: Fault) -> dict[str, str]:
    """Faults outside the body carry `query/limit` and the like, which no JSON pointer starts with."""
    in_body = fault.pointer == "" or fault.pointer.startswith("/")
    return {"pointer" if in_body else "parameter": fault.pointer, "detail": fault.detail}
