"""Celery as the sender sees it: names of tasks, and messages that carry an id and nothing else.

A message is only a hint that a job's row is ready. Losing one costs a sweep; a second one changes nothing.
"""

from __future__ import annotations

from functools import lru_cache

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from app.settings import get_settings

RUN_JOB = "modelpress.run_job"

_log = structlog.get_logger(__name__)


@lru_cache(maxsize=1)
def get_celery() -> Celery:
    """The sender's Celery; workers configure their own in workers/celery_app.py."""
    celery = Celery("modelpress", broker=broker_url(), set_as_current=False)
    celery.conf.update(
        # A submit must not hang while the broker is away: the row is the outbox, the sweeper sends it later.
        broker_connection_timeout=2,
        # kombu would otherwise try again for two seconds, in which the route holds one of a few sessions.
        broker_transport_options={
            "socket_timeout": 2,
            "socket_connect_timeout": 2,
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0,
        },
        task_publish_retry=False,
        task_ignore_result=True,
    )
    return celery


def broker_url() -> str:
    """The broker's URL in Celery's spelling: a unix socket is `redis+socket://`."""
    url = get_settings().redis_url
    return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url


def enqueue_job(job_id: str, queue: str) -> bool:
    """Tell the workers of a queue that a job is ready. False: the broker is away, and the sweeper will try again."""
    try:
        get_celery().send_task(RUN_JOB, args=[job_id], queue=queue)
    except (OperationalError, RedisError, OSError) as error:
        _log.warning("broker_unavailable", job_id=job_id, error=str(error))
        return False
    return True
