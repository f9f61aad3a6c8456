"""`Idempotency-Key` on POST: the same key with the same body gives the first answer again, and does nothing twice.

The answer is kept in the transaction that does the work, so there is never one without the other. An error is not
kept: it left nothing behind, and the same call may succeed later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Annotated, Any

from anyio import CancelScope
from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session
from starlette.datastructures import UploadFile

from app.api.dependencies import database_of
from app.db import idempotency_queries
from app.db.engine import Database
from app.db.idempotency_queries import Answer, Taken
from app.errors import Conflict, InvalidRequest

_HEADER = "Idempotency-Key"
_MAX_LENGTH = 255
# A call that has taken longer most likely died with its process. If it lives it ends with a
# conflict, and what its session wrote is undone.
_ABANDONED_AFTER_SECONDS = 900.0
_KEPT_SECONDS = 86_400.0
_HASH_CHUNK_BYTES = 2**20
_KEPT_HEADERS = ("location", "content-type")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def _documented_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            alias=_HEADER,
            min_length=1,
            max_length=_MAX_LENGTH,
            description="Any text you make up for this call, e.g. a UUID. Sent again with the same body, the first "
            "answer is given again and nothing is done twice; with another body the call is refused.",
        ),
    ] = None,
) -> None:
    """Put the header into OpenAPI and check its length; the route reads it itself."""


class IdempotentRoute(APIRoute):
    """`APIRouter(route_class=IdempotentRoute)`: its POST routes honour Idempotency-Key, the others are left alone."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            options["dependencies"] = [*(options.get("dependencies") or ()), Depends(_documented_key)]
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handler:
        """The route's handler, wrapped."""
        handle = super().get_route_handler()

        async def idempotent(request: Request) -> Response:
            key = request.headers.get(_HEADER, "")
            if request.method != "POST" or not 1 <= len(key) <= _MAX_LENGTH:
                return await handle(request)
            try:
                return await _once(key, request, handle)
            finally:
                # A form that was only hashed, for a call that was answered before, still holds its spooled files.
                await request.close()

        return idempotent


async def _once(key: str, request: Request, handle: Handler) -> Response:
    digest = await _digest(request)
    taken = await run_in_threadpool(_begin, database_of(request), key, digest)
    if isinstance(taken, Answer):
        return Response(taken.body, taken.status_code, {**taken.headers, "Idempotency-Replayed": "true"})
    _forget_if_it_fails(request, taken)
    response = await handle(request)
    headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    answer = Answer(response.status_code, headers, bytes(response.body).decode())
    await run_in_threadpool(_keep, request, taken, answer)
    return response


def _forget_if_it_fails(request: Request, taken: Taken) -> None:
    """Free the key when the route, the keeping of its answer or the commit raises.

    FastAPI commits when it unwinds this stack, last entered first: what is pushed before the route's dependencies
    hears of that too, and when it runs no session of theirs holds a lock.
    """
    stack: AsyncExitStack = request.scope["fastapi_function_astack"]

    async def forget(
        _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if error is not None:
            with CancelScope(shield=True):
                await run_in_threadpool(_forget, database_of(request), taken)

    stack.push_async_exit(forget)


def _begin(database: Database, key: str, digest: str) -> Taken | Answer:
    """Take the key, or return the answer it was given. Raises InvalidRequest or Conflict."""
    with database.write() as session:
        idempotency_queries.delete_old_keys(session, older_than_seconds=_KEPT_SECONDS)
        taken = idempotency_queries.take_key(session, key, digest, stale_seconds=_ABANDONED_AFTER_SECONDS)
        if taken is not None:
            return taken
        request_sha256, answer = idempotency_queries.read_key(session, key)
    if request_sha256 != digest:
        raise InvalidRequest(
            f"This {_HEADER} was used for another request.",
            code="idempotency_mismatch",
            hint="Make up a new key for every new request, and keep it only to send the same one again.",
        )
    if answer is None:
        raise _in_flight()
    return answer


def _keep(request: Request, taken: Taken, answer: Answer) -> None:
    """Write the answer down in the transaction of the work, which is committed when the route's sessions close.

    Raises Conflict where the key was taken over meanwhile: the work is undone, the other call does it.
    """
    session: Session | None = getattr(request.state, "write_session", None)
    if session is None:
        with database_of(request).write() as own:
            kept = idempotency_queries.keep_answer(own, taken, answer)
    else:
        kept = idempotency_queries.keep_answer(session, taken, answer)
    if not kept:
        raise _in_flight()


def _forget(database: Database, taken: Taken) -> None:
    with database.write() as session:
        idempotency_queries.forget_key(session, taken)


def _in_flight() -> Conflict:
    return Conflict(
        f"The first request with this {_HEADER} is still being worked on.",
        code="idempotency_in_flight",
        hint="Ask again in a moment.",
    )


async def _digest(request: Request) -> str:
    """A digest of what is asked. The boundaries of a form are made up anew each time, so its fields are hashed."""
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode())
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        digest.update(await request.body())
        return digest.hexdigest()
    for name, value in (await request.form()).multi_items():
        digest.update(f"\n{len(name)} {name}\n".encode())
        if isinstance(value, UploadFile):
            await run_in_threadpool(_hash_file, digest, value)
        else:
            digest.update(value.encode())
    return digest.hexdigest()


def _hash_file(digest: hashlib._Hash, upload: UploadFile) -> None:
    digest.update(f"{upload.filename}\n".encode())
    while chunk := upload.file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    upload.file.seek(0)
