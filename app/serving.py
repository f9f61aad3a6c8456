"""The long-running commands: the API alone or with everything embedded, a worker, the sweeper."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from app import tracing
from app.db.engine import get_database
from app.db.worker_queries import list_fresh
from app.embedded import embedded_services, worker_command
from app.errors import InvalidRequest, Unavailable
from app.logging import configure_logging
from app.services.import_fetching import import_forever
from app.services.keys import server_secret
from app.services.store_check import Fault, find_faults
from app.services.sweeping import sweep_forever
from app.services.webhook_delivery import deliver_forever
from app.settings import Settings, get_settings, is_loopback
from app.storage import get_store

# Downloads and event streams still open when the service is told to stop are cut after this.
_GRACEFUL_SECONDS = 5
_ALLOCATIONS_BETWEEN_COLLECTIONS = 20_000


def serve(host: str, port: int, *, api_only: bool, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then stop everything in order. `announce` is given the URL once it answers."""
    _refuse_strangers(host, get_settings())
    tracing.check()
    with _listen(host, port) as listener, _sigterm_unwinds(), contextlib.ExitStack() as stack:
        if api_only:
            _require_broker(get_settings())
        else:
            stack.enter_context(embedded_services())
        get_store().check()
        stack.enter_context(_importing())
        url = f"http://{_for_browsers(host)}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            "app.main:app", log_config=None, timeout_graceful_shutdown=_GRACEFUL_SECONDS, server_header=False
        )
        _AnnouncingServer(config, lambda: announce(url)).run(sockets=[listener])


def run_worker() -> None:
    """Become a Celery worker: this process is replaced, so that signals reach Celery itself."""
    settings = get_settings()
    _require_broker(settings)
    tracing.check()
    get_store().check()
    command = worker_command(settings)
    os.execv(command[0], command)  # noqa: S606 - a list of our own words


def run_sweeper() -> None:
    """Sweep and send webhooks until SIGINT or SIGTERM."""
    settings = get_settings()
    _require_broker(settings)
    configure_logging(settings)
    get_store().check()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    webhooks = threading.Thread(
        target=deliver_forever, args=(get_database(), settings, stop), name="webhooks", daemon=True
    )
    webhooks.start()
    sweep_forever(get_database(), settings, stop)
    webhooks.join(timeout=settings.webhook_timeout_seconds)


def require_announced_worker() -> None:
    """Raise Unavailable unless a worker of this host has announced itself lately."""
    with get_database().read() as session:
        workers = [worker.id for worker in list_fresh(session)]
    if not any(name.startswith(f"{socket.gethostname()}:") for name in workers):
        raise Unavailable("No worker of this host has announced itself lately.", code="no_worker")


def find_store_faults(*, digests: bool) -> Iterator[Fault | None]:
    """Each file of the store that the database refers to: None where it is well."""
    return find_faults(get_database(), get_store(), digests=digests)


class _AnnouncingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        # What was made by now stays: a collection that walks through all of it halts every request for a tenth of a second.
        gc.freeze()
        gc.set_threshold(_ALLOCATIONS_BETWEEN_COLLECTIONS)
        self._announce()


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Fetch imports until the block ends; what is under way then is left to others, or to the next start."""
    stop = threading.Event()
    thread = threading.Thread(
        target=import_forever, args=(get_database(), get_settings(), stop), name="imports", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=_GRACEFUL_SECONDS)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, taken before anything is started: a port in use is told at once. Port 0: any free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    with listener:
        yield listener


def _cannot_listen(host: str, port: int, error: OSError) -> InvalidRequest:
    if error.errno == errno.EADDRINUSE:
        return InvalidRequest(
            f"Port {port} on {host} is in use.",
            code="port_in_use",
            hint="Stop what listens there, or choose another: modelpress serve --port 8001 (0: any free one).",
        )
    return InvalidRequest(f"Cannot listen on {host}, port {port}: {error.strerror}.", code="cannot_listen")


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Make SIGTERM an exception, so that what is embedded is stopped in order as on Ctrl-C."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_strangers(host: str, settings: Settings) -> None:
    """Raise InvalidRequest unless whoever can reach the service needs a key, or can only be on this machine."""
    if is_loopback(host):
        return
    if settings.anonymous:
        raise InvalidRequest(
            f"On {host} everybody who reaches this machine could use the service without a key.",
            code="anonymous_in_public",
            hint="Set MODELPRESS_ANONYMOUS=false and MODELPRESS_SECRET_KEY (openssl rand -hex 32), then make the "
            "first key: modelpress keys create first --role administrator. Or listen on 127.0.0.1.",
        )
    server_secret(settings.model_copy(update={"host": host}))


def _require_broker(settings: Settings) -> None:
    if not settings.redis_url:
        raise InvalidRequest(
            "REDIS_URL is not set.",
            code="no_broker",
            hint="Point it at a Redis or Valkey server, or run `modelpress serve`, which brings its own.",
        )


def _for_browsers(host: str) -> str:
    """An address one can open: `0.0.0.0` and `::` mean every address of this machine."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
