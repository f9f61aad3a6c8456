"""What happens around every request: an id, a log line, limits on the body and on the rate, and an answer to unforeseen errors."""

from __future__ import annotations

import itertools
import re
import time
import uuid
from collections.abc import Collection

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import tracing
from app.access import Principal
from app.api.problems import render, render_unexpected
from app.api.together import Together
from app.errors import PayloadTooLarge, TooManyRequests
from app.rate_limits import WINDOW_SECONDS, Allowance, RateLimiter
from app.settings import MIB, Settings
from app.threads import COUNTING, PerLoop

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
# Polled every few seconds by machines: their lines and spans would bury the others.
_POLLED = ("/health/", "/metrics")

_log = structlog.get_logger("modelpress.request")


class RequestContext:
    """Give each request an id, bind it to the log, and answer 500 with an id when something breaks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wrap one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        structlog.contextvars.clear_contextvars()
        tracing.describe_request({"request_id": request_id})
        if scope["query_string"]:
            tracing.hide_query()
        structlog.contextvars.bind_contextvars(request_id=request_id, **tracing.log_fields())
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            response = render_unexpected(error)
            if status:
                # Too late for a problem: cut the connection so that the client does not take half for the whole.
                raise
            await response(scope, receive, send_with_id)
        finally:
            _log_request(scope, status, time.perf_counter() - started)


def is_polled(path: str) -> bool:
    """Whether machines ask for it all the time."""
    return path.startswith(_POLLED) or "/health/" in path


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    path = scope["path"]
    log = _log.debug if is_polled(path) else _log.info
    log("request", method=scope["method"], path=path, status=status, milliseconds=round(1000 * seconds, 1))


class BodyLimit:
    """Refuse a body larger than its kind of route takes, by its declared length or while it is read."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        # Parts check their own length against the upload's, so their cap here is only the largest part there is.
        self._limits = (
            (re.compile(r"^PUT /v1/uploads/[^/]+/parts/[^/]+$"), max(settings.part_bytes, 64 * MIB)),
            (re.compile(r"^PUT /v1/(models|datasets)/content$"), settings.max_raw_body_bytes),
            (re.compile(r"^POST /v1/compress$"), settings.max_form_bytes),
            (re.compile(r""), settings.max_json_bytes),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wrap one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = f"{scope['method']} {scope['path']}"
        limit = next(limit for pattern, limit in self._limits if pattern.match(call))
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            # The unread rest of the body would be taken for the next request.
            await render(_too_large(limit), {"Connection": "close"})(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # FastAPI takes any other exception for a body that cannot be parsed.
                raise HTTPException(413) from _too_large(limit)
            return message

        await self.app(scope, receive_within_limit, send)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The body is larger than the {limit} bytes this call takes.",
        hint="Send large files in parts: POST /v1/uploads.",
    )


class RateLimit:
    """Count calls by tenant, say on each answer how many are left (RateLimit headers), and refuse those over the limit."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        limited = settings.rate_limit_per_minute > 0 and settings.redis_url
        self._limiter = RateLimiter(settings.redis_url, settings.rate_limit_per_minute) if limited else None
        self._numbers = itertools.count()
        self._counting = PerLoop("counting", lambda: Together(self._count, COUNTING))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wrap one request. Who calls without having to say who it is, is not counted."""
        principal: Principal | None = scope.get("state", {}).get("principal")
        if self._limiter is None or principal is None:
            await self.app(scope, receive, send)
            return
        # Equal questions are asked once, and each call counts.
        allowance = await self._counting().ask((principal.tenant, next(self._numbers)))
        if allowance is None:
            await self.app(scope, receive, send)
            return
        headers = _rate_limit_headers(self._limiter.per_minute, allowance)
        if not allowance.allowed:
            wait = {"Retry-After": str(allowance.reset_seconds), "Connection": "close"}
            await render(_too_often(self._limiter.per_minute, allowance), headers | wait)(
                scope, receive, send
            )
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _count(self, calls: Collection[tuple[str, int]]) -> dict[tuple[str, int], Allowance]:
        allowances = self._limiter and self._limiter.take([tenant for tenant, _ in calls])
        return dict(zip(calls, allowances, strict=True)) if allowances else {}


def _rate_limit_headers(per_minute: int, allowance: Allowance) -> dict[str, str]:
    """As the IETF's draft on RateLimit header fields has them: q calls in w seconds; r are left, all again in t."""
    return {
        "RateLimit-Policy": f'"tenant";q={per_minute};w={WINDOW_SECONDS}',
        "RateLimit": f'"tenant";r={allowance.remaining};t={allowance.reset_seconds}',
    }


def _too_often(per_minute: int, allowance: Allowance) -> TooManyRequests:
    return TooManyRequests(
        f"Your tenant may make {per_minute} calls a minute.",
        code="rate_limited",
        hint=f"Go on in {allowance.reset_seconds} s (Retry-After). To wait for a job, follow its events instead of polling.",
    )
