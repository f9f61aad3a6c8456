"""Celery as the worker runs it; each setting with its why."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import threading
from functools import cache
from typing import Any

import structlog
from celery import Celery, signals

from app import tracing
from app.db import worker_queries
from app.db.engine import get_database
from app.errors import InvalidRequest, Unavailable
from app.logging import configure_logging
from app.queue import broker_url
from app.services.loops import forever
from app.services.sweeping import remove_old_scratch
from app.settings import SandboxLevel, get_settings
from app.storage import forget_store
from workers import hardware, sandbox, sandbox_levels
from workers.watchdog import Watchdog

_ANNOUNCE_SECONDS = 10
_log = structlog.get_logger(__name__)
_draining = multiprocessing.Event()
_leaving = threading.Event()

app = Celery("modelpress", broker=broker_url(), include=["workers.tasks"])
app.conf.update(
    # The database is the truth and a message a hint: acknowledge at once. Acknowledging late would have Redis deliver
    # every job that runs longer than its visibility timeout a second time.
    task_acks_late=False,
    # A worker takes a message only when it can start on it; hoarded messages would wait behind a long job.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # Results live in the database.
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    # Attempts are counted in the job's row, not by redelivery.
    task_reject_on_worker_lost=False,
    # A broker that is away at start or later is waited for, for ever.
    broker_connection_retry=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={"health_check_interval": 10, "socket_keepalive": True},
    # Gossip, mingle and events serve a fleet that talks about itself; ours asks the database.
    worker_send_task_events=False,
    worker_concurrency=get_settings().worker_concurrency,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
)


def draining() -> bool:
    """Whether this worker has been told to shut down; seen by its pool's processes too."""
    return _draining.is_set()


@cache
def sandbox_level() -> SandboxLevel:
    """The level this worker runs its jobs at; tried out once, before the pool is forked."""
    settings = get_settings()
    found = sandbox_levels.strongest(settings)
    for level, why in found.missing.items():
        _log.warning("sandbox_is_weaker", level=found.level, without=level, because=why)
    return found.level


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _logging(**_: Any) -> None:
    configure_logging(get_settings())


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _before_the_pool(**_: Any) -> None:
    """Refuse to start without what is asked for: a job must never run in a weaker sandbox."""
    sandbox.hide_memory()
    try:
        sandbox_level()
        tracing.check()
    except (Unavailable, InvalidRequest) as error:
        _log.error(error.code, error=error.detail, hint=error.hint)
        # Of an Exception, Celery would log the traceback and go on.
        raise SystemExit(1) from None


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _in_pool_process(**_: Any) -> None:
    """A pool process, and with it the job it runs, must not outlive a worker that is killed."""
    sandbox.die_with_parent()
    # A connection opened before the fork belongs to the parent.
    get_database.cache_clear()
    forget_store()
    tracing.start("worker")


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _pool_process_leaves(**_: Any) -> None:
    tracing.stop()


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _ready(**_: Any) -> None:
    threading.Thread(target=_announce_until_leaving, daemon=True, name="announce").start()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _shutting_down(**_: Any) -> None:
    _draining.set()
    _leaving.set()


def _announce_until_leaving() -> None:
    """Tell the database every few seconds that this worker is there, and what it has."""
    settings = get_settings()
    worker_id = f"{socket.gethostname()}:{os.getpid()}"
    facts = hardware.describe(settings)
    database = get_database()
    watchdog = Watchdog(settings)

    def announce() -> None:
        with database.write() as session:
            worker_queries.announce(
                session, worker_id, queues=settings.worker_queues, hardware=facts, sandbox=sandbox_level()
            )
            deaf = watchdog.finds_deaf(session)
            if deaf:
                worker_queries.withdraw(session, worker_id)
        if deaf:
            _log.error("worker_is_deaf", hint="It ends, and whoever started it should start it again.")
            # It has no job; its pool follows it. A deaf worker may not hear that it should shut down.
            os._exit(1)
        # The sweeper may be on another machine, and have another disk.
        remove_old_scratch(database, settings)

    forever(announce, _leaving, name="announce", every_seconds=_ANNOUNCE_SECONDS)
    with contextlib.suppress(Unavailable), database.write() as session:
        worker_queries.withdraw(session, worker_id)
