"""What whole kinds of operations answer with, said once for all of them in the OpenAPI document.

405 is none of them: an operation that is in the document has its method.
"""

from __future__ import annotations

from typing import Any

from app.api.authentication import is_open
from app.api.problems import MEDIA_TYPE, problem_body
from app.api.validation import MalformedBody
from app.errors import (
    Conflict,
    Fault,
    Forbidden,
    InvalidRequest,
    ModelpressError,
    PayloadTooLarge,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)

_PARSED = ("application/json", "multipart/form-data")
_WAIT = {"Retry-After": {"description": "Seconds after which to ask again.", "schema": {"type": "integer"}}}
_CHALLENGE = {
    "WWW-Authenticate": {"description": "`Bearer` and why (RFC 6750).", "schema": {"type": "string"}}
}
_LOCATION = {"Location": {"description": "Where it is now.", "required": True, "schema": {"type": "string"}}}
# (what it means, headers, an example)
_ANSWERS: dict[int, tuple[str, dict[str, Any], ModelpressError]] = {
    400: (
        "The body is not what its content type says.",
        {},
        MalformedBody(
            "The body is not JSON: Expecting value at character 10.",
            hint="Check quotes and commas; strings and names take double quotes.",
        ),
    ),
    401: (
        "No key came with the call, or one that is not valid.",
        _CHALLENGE,
        Unauthenticated("This call needs an API key.", hint="Send `Authorization: Bearer mp_…`."),
    ),
    403: (
        "The key does not allow this, or a quota does not.",
        _CHALLENGE,
        Forbidden(
            "This call needs the role administrator; key_01k0b6x2v9m4c8d7e5f3g1h0j2 is submitter.",
            hint="Use another key, or ask an administrator for one.",
        ),
    ),
    409: (
        "It is not in a state that allows this, or the first call with this Idempotency-Key is still being worked on.",
        {},
        Conflict(
            "The first request with this Idempotency-Key is still being worked on.",
            code="idempotency_in_flight",
            hint="Ask again in a moment.",
        ),
    ),
    413: (
        "The body is larger than this call takes.",
        {},
        PayloadTooLarge(
            "The body is larger than the 1048576 bytes this call takes.",
            hint="Send large files in parts: POST /v1/uploads.",
        ),
    ),
    422: (
        "Something that was sent does not fit: `errors` says what and where.",
        {},
        InvalidRequest(
            "The request has 1 fault; see `errors`.",
            faults=[Fault("query/limt", "There is no such parameter here. Did you mean limit?")],
        ),
    ),
    429: (
        "The tenant calls too often, or has too much under way.",
        _WAIT,
        TooManyRequests(
            "Your tenant may make 600 calls a minute.", code="rate_limited", hint="Go on in 12 s (Retry-After)."
        ),
    ),
    503: (
        "Something the service needs does not answer.",
        _WAIT,
        Unavailable(
            "The database does not answer.", code="database_unavailable", hint="Try again in a few seconds."
        ),
    ),
}  # fmt: skip


def common_answers() -> dict[str, Any]:
    """What stands under `components/responses`, by the names of the errors."""
    return {type(error).__name__: _described(status) for status, (_, _, error) in _ANSWERS.items()}


def add_common_answers(path: str, operation: dict[str, Any]) -> None:
    """Add to an operation what it has in common with others, and put its answers in order."""
    responses = operation["responses"]
    for status in _statuses(path, operation):
        name = type(_ANSWERS[status][2]).__name__
        responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
    if "201" in responses:
        responses["201"]["headers"] = _LOCATION
    operation["responses"] = dict(sorted(responses.items()))


def _statuses(path: str, operation: dict[str, Any]) -> set[int]:
    body = operation.get("requestBody", {}).get("content", {})
    statuses = {413} if body else set()
    if any(media_type in body for media_type in _PARSED):
        statuses.add(400)
    if any(parameter["name"] == "Idempotency-Key" for parameter in operation.get("parameters", ())):
        statuses.add(409)
    # Every route of ours refuses unknown parameters of a query.
    if path.startswith("/v1/"):
        statuses.add(422)
    # To find out who calls takes the database, and who is known is counted.
    return statuses if is_open(path) else statuses | {401, 403, 429, 503}


def _described(status: int) -> dict[str, Any]:
    description, headers, example = _ANSWERS[status]
    # The example must not carry the id of the request that happened to ask first for the document.
    shown = {name: value for name, value in problem_body(example).items() if name != "request_id"}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": shown}}
    return {"description": description, "content": content} | ({"headers": headers} if headers else {})
