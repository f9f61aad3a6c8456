"""Answering many calls with one look: what hundreds of clients ask over and over must not cost hundreds of times as much."""

from __future__ import annotations

import asyncio
import contextvars
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Generic, TypeVar

from app.threads import Threads

K = TypeVar("K")
V = TypeVar("V")


class Together(Generic[K, V]):
    """Questions that come while a look is under way are answered by the next one, all at once, equal ones once.

    A look begins after all that it answers have come, so nobody is told what was true before he asked. For one event loop.
    """

    def __init__(self, look: Callable[[Collection[K]], Mapping[K, V]], threads: Threads) -> None:
        """`look` has the answers to the questions it is given, or raises for all of them; it is called in `threads`."""
        self._look = look
        self._threads = threads
        self._waiting: defaultdict[K, list[asyncio.Future[V | None]]] = defaultdict(list)
        self._looking: asyncio.Task[None] | None = None

    async def ask(self, question: K) -> V | None:
        """The answer; None where the look had none. Raises what the look raised."""
        answer: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        self._waiting[question].append(answer)
        if self._looking is None:
            # In a context of its own: it works for many requests, and logs for none.
            self._looking = asyncio.create_task(self._answer(), context=contextvars.Context())
        return await answer

    async def _answer(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, defaultdict(list)
            await self._answer_these(waiting)
        self._looking = None

    async def _answer_these(self, waiting: Mapping[K, list[asyncio.Future[V | None]]]) -> None:
        try:
            answers = await self._threads.run(self._look, list(waiting))
        except Exception as error:  # noqa: BLE001 - raised where it was asked
            for answer in _open(waiting):
                answer.set_exception(error)
            return
        for question, asked in waiting.items():
            for answer in asked:
                if not answer.done():
                    answer.set_result(answers.get(question))


def _open(waiting: Mapping[K, list[asyncio.Future[V | None]]]) -> list[asyncio.Future[V | None]]:
    """Those whose client has not gone away."""
    return [answer for asked in waiting.values() for answer in asked if not answer.done()]
