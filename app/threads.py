"""Threads of their own for work that is slow or comes in crowds: whatever it does, other requests find one at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

T = TypeVar("T")


class PerLoop(Generic[T]):
    """A thing of which each event loop has its own, made when it is first asked for there."""

    def __init__(self, name: str, make: Callable[[], T]) -> None:
        self._make = make
        self._made: RunVar[T] = RunVar(name)

    def __call__(self) -> T:
        """That of the running event loop."""
        try:
            return self._made.get()
        except LookupError:
            made = self._make()
            self._made.set(made)
            return made


class Threads:
    """At most `count` threads of an event loop, beside the 40 that routes share; who finds none waits for one."""

    def __init__(self, name: str, count: int) -> None:
        self._limiter = PerLoop(name, lambda: CapacityLimiter(count))

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Call `work` in one of them."""
        return await run_sync(work, *arguments, limiter=self._limiter())


INTAKE = Threads("intake", 8)
"""Reading, unpacking, hashing and fetching of uploads: minutes for large ones."""
STREAMS = Threads("streams", 4)
"""Looks for the events of jobs: as many as there are listeners, each short."""
READS = Threads("reads", 4)
"""Looks that answer many calls at once."""
IDENTITIES = Threads("identities", 4)
"""Finding out who calls, before anything else is done for him."""
COUNTING = Threads("counting", 1)
"""Counting calls against their tenant's limit."""
NAMES = Threads("names", 4)
"""Waiting for the servers of names that users choose, and may have made slow."""
HEALTH = Threads("health", 1)
"""Asking all that the service needs, which anybody may have it do."""
