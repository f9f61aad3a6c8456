"""Threads of their own for work that is slow or comes in crowds: whatever it does, other requests find one at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

T = TypeVar("T")


class Threads:
    """At most `count` threads of an event loop, beside the 40 that routes share; who finds none waits for one."""

    def __init__(self, name: str, count: int) -> None:
        self._count = count
        self._limiter: RunVar[CapacityLimiter] = RunVar(name)

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Call `work` in one of them."""
        try:
            limiter = self._limiter.get()
        except LookupError:
            limiter = CapacityLimiter(self._count)
            self._limiter.set(limiter)
        return await run_sync(work, *arguments, limiter=limiter)


INTAKE = Threads("intake", 8)
"""Reading, unpacking, hashing and fetching of uploads: minutes for large ones."""
STREAMS = Threads("streams", 4)
"""Looks for the events of jobs: as many as there are listeners, each short."""
READS = Threads("reads", 4)
"""Looks that answer many calls at once."""
HEALTH = Threads("health", 1)
"""Asking all that the service needs, which anybody may have it do."""
