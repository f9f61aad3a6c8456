"""Whether a worker has stopped to take messages: Celery may go deaf after its broker was away, and says nothing.

It is deaf when a job of its queues has been due for long, was sent again meanwhile, and nothing came to an idle worker.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import redis
from celery.worker import state
from sqlalchemy.orm import Session

from app.db import worker_queries
from app.settings import Settings

_SENT_AGAIN = 3
"""A message may be lost, and the next may meet a broker that is only just back; not three."""


@dataclass
class Watchdog:
    """Looks every few seconds, from within the worker's main process."""

    settings: Settings
    _tasks_seen: int = -1
    _quiet_since: float = field(default_factory=time.monotonic)

    def finds_deaf(self, session: Session) -> bool:
        """Whether this worker should be ended, so that whoever started it starts another."""
        again = self.settings.redispatch_seconds
        patience = _SENT_AGAIN * again
        tasks = sum(state.total_count.values())
        if tasks != self._tasks_seen or state.active_requests or state.reserved_requests:
            self._tasks_seen, self._quiet_since = tasks, time.monotonic()
        if time.monotonic() - self._quiet_since < patience:
            return False
        queues = self.settings.worker_queues.split(",")
        waits = worker_queries.a_job_waits(
            session,
            queues,
            memory_bytes=self.settings.worker_memory_bytes,
            for_seconds=patience,
            sent_within_seconds=2 * again,
        )
        return waits and self._broker_answers()

    def _broker_answers(self) -> bool:
        """Without a broker nobody hears anything, and a new worker would not either."""
        client = redis.Redis.from_url(self.settings.redis_url, socket_timeout=2, socket_connect_timeout=2)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()
