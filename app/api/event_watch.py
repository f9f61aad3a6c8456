"""When has a job news? One query answers for all streams of a process, four times a second."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping

from app.db import job_queries
from app.db.engine import get_database
from app.errors import ModelpressError
from app.threads import STREAMS, PerLoop

_LOOK_SECONDS = 0.25


class EventWatch:
    """All who wait for news of jobs on this event loop."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, dict[asyncio.Future[None], int]] = defaultdict(dict)
        self._look: asyncio.Task[None] | None = None

    async def news(self, job_id: str, *, after: int) -> None:
        """Wait until the job has an event above `after`, has ended or is deleted, or the database does not answer."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[job_id][waiting] = after
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._look_while_somebody_waits())
        try:
            await waiting
        finally:
            self._waiting[job_id].pop(waiting, None)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def _look_while_somebody_waits(self) -> None:
        while self._waiting:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                open_jobs = await STREAMS.run(_open_jobs, list(self._waiting))
            except ModelpressError:
                # Each stream finds out by itself what is wrong, and tells its client.
                open_jobs = {}
            self._wake(open_jobs)

    def _wake(self, open_jobs: Mapping[str, int]) -> None:
        for job_id, streams in self._waiting.items():
            for waiting, after in streams.items():
                if not waiting.done() and open_jobs.get(job_id, after + 1) > after:
                    waiting.set_result(None)


event_watch = PerLoop("event_watch", EventWatch)


def _open_jobs(job_ids: Collection[str]) -> dict[str, int]:
    with get_database().for_service().read() as session:
        return job_queries.count_events(session, job_ids)
