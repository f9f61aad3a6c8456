"""A job's events as a stream (server-sent events), read from the database, which is where they are the truth."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from app.api.event_watch import event_watch
from app.db.engine import Database
from app.errors import NotFound
from app.services import jobs
from app.services.job_view import EventView
from app.threads import STREAMS

# Proxies cut connections that are silent for a minute, some after thirty seconds.
_KEEP_ALIVE_SECONDS = 15.0
_BATCH = 500


def wants_event_stream(request: Request) -> bool:
    """Whether the client asks for a stream."""
    return "text/event-stream" in request.headers.get("accept", "")


def event_stream(database: Database, job_id: str, *, after: int) -> StreamingResponse:
    """Events above `after`, then what happens, until the job has ended or is deleted."""
    return StreamingResponse(
        _follow(database, job_id, after),
        media_type="text/event-stream",
        # nginx would hold events back until its buffer is full.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _follow(database: Database, job_id: str, after: int) -> AsyncIterator[bytes]:
    spoke = time.monotonic()
    while True:
        events, has_more, ended = await STREAMS.run(_read, database, job_id, after)
        for event in events:
            yield _encoded(event)
            after, spoke = event.number, time.monotonic()
        if ended and not has_more:
            return
        if has_more:
            continue
        try:
            async with asyncio.timeout(max(0, spoke + _KEEP_ALIVE_SECONDS - time.monotonic())):
                await event_watch().news(job_id, after=after)
        except TimeoutError:
            yield KEEPALIVE_COMMENT
            spoke = time.monotonic()


def _read(database: Database, job_id: str, after: int) -> tuple[list[EventView], bool, bool]:
    """One look, with a session of its own: a stream lives for hours, a transaction must not."""
    with database.read() as session:
        try:
            return jobs.read_events(session, job_id, after=after, limit=_BATCH)
        except NotFound:
            return [], False, True


def _encoded(event: EventView) -> bytes:
    return format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.number))
