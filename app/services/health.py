"""Can the service work? Each dependency is asked, none is trusted to be there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

import structlog
from pydantic import Field

from app.db import worker_queries
from app.db.engine import get_database
from app.db.health_queries import database_version
from app.errors import ModelpressError
from app.settings import SANDBOX_LEVELS, SandboxLevel, Settings
from app.spec.documented import Documented
from app.storage import get_store
from app.storage.disk import probe_disk

_RECENT_SECONDS = 2.0

_log = structlog.get_logger(__name__)

_SANDBOX_DETAILS: dict[SandboxLevel, str] = {
    "namespaces": "jobs run in namespaces of their own, without network",
    "landlock": "jobs run under Landlock and seccomp, without network",
    "process": "WARNING: a job's process may read what its worker may read, and reach the network. Install bubblewrap or "
    "use a kernel with Landlock, and set MODELPRESS_SANDBOX=landlock",
}


class Check(Documented):
    """One dependency."""

    ok: bool
    required: bool = True
    """Whether the service is not ready without it."""
    detail: str
    facts: dict[str, Any] = Field(default_factory=dict)


class Readiness(Documented):
    """Whether the service can take jobs, and every dependency's part in that."""

    status: Literal["ready", "degraded", "unavailable"]
    """`degraded`: jobs are accepted and wait, e.g. for the broker or a worker to come back."""
    checks: dict[str, Check]


class RecentReadiness:
    """`check_readiness`, at most every two seconds: anybody may ask, and what it does is work."""

    def __init__(self) -> None:
        self._seen_at = 0.0
        self._readiness: Readiness | None = None

    def look(self, settings: Settings) -> Readiness:
        """What was seen lately, else what is seen now. For one thread at a time."""
        if self._readiness is None or time.monotonic() - self._seen_at > _RECENT_SECONDS:
            self._readiness = check_readiness(settings)
            self._seen_at = time.monotonic()
        return self._readiness


def check_readiness(settings: Settings) -> Readiness:
    """Ask database, broker, storage and workers."""
    checks = {
        "database": _guarded("database", _database),
        "storage": _guarded("storage", lambda: _storage(settings)),
        "broker": _guarded("broker", lambda: _broker(settings), required=False),
        "workers": _guarded("workers", _workers, required=False),
        "sandbox": _guarded("sandbox", lambda: _sandbox(settings), required=False),
    }
    if any(not check.ok and check.required for check in checks.values()):
        return Readiness(status="unavailable", checks=checks)
    return Readiness(status="ready" if all(c.ok for c in checks.values()) else "degraded", checks=checks)


def _guarded(name: str, check: Callable[[], Check], *, required: bool = True) -> Check:
    """A check that fails says so; it never makes the answer itself fail.

    Everybody may ask: names of hosts, buckets and directories are for the log.
    """
    try:
        return check().model_copy(update={"required": required})
    except ModelpressError as error:
        _log.warning("not_ready", check=name, code=error.code, error=error.detail)
        why = error.code
    except Exception as error:  # noqa: BLE001 - logged with its trace
        _log.exception("not_ready", check=name)
        why = type(error).__name__
    return Check(ok=False, required=required, detail=f"fails ({why}); the API's log says more")


def _database() -> Check:
    database = get_database()
    with database.read() as session:
        version = database_version(session)
    kind = database.engine.dialect.name
    return Check(ok=True, detail=f"{kind} answers", facts={"kind": kind, "schema_version": version})


def _storage(settings: Settings) -> Check:
    """The store, and the disk, which uploads pass through on their way into it. Both are really written to."""
    directory = settings.data_dir.absolute()
    get_store().check()
    if settings.store:
        probe_disk(directory)
    # How much is free exactly would tell everybody when a blob was stored anew, and when others had it already.
    enough = shutil.disk_usage(directory).free > settings.min_free_disk_bytes
    detail = "writable" if enough else f"nearly full: less than {settings.min_free_disk_bytes} bytes free"
    return Check(ok=enough, detail=detail)


def _broker(settings: Settings) -> Check:
    if not settings.redis_url:
        return Check(ok=False, detail="no broker is configured (REDIS_URL); jobs wait")
    # A seventh of the time that all of the API takes to import.
    import redis

    client = redis.Redis.from_url(settings.redis_url, socket_timeout=2, socket_connect_timeout=2)
    try:
        client.ping()
    except redis.RedisError as error:
        return Check(ok=False, detail=f"does not answer ({type(error).__name__}); jobs wait until it does")
    finally:
        client.close()
    return Check(ok=True, detail="answers")


def _workers() -> Check:
    """Without a worker jobs are accepted and wait."""
    with get_database().read() as session:
        workers = worker_queries.list_fresh(session)
    queues = sorted({queue for worker in workers for queue in worker.queues.split(",")})
    facts = {"count": len(workers), "queues": queues, "sandboxes": sorted({w.sandbox for w in workers})}
    if not workers:
        return Check(ok=False, detail="no worker has been seen lately; jobs wait for one", facts=facts)
    return Check(ok=True, detail=f"{len(workers)} seen lately", facts=facts)


def _sandbox(settings: Settings) -> Check:
    """The weakest among the workers is the one to know of: a stranger's job may run there."""
    with get_database().read() as session:
        levels = {worker.sandbox for worker in worker_queries.list_fresh(session)}
    weakest = next((level for level in reversed(SANDBOX_LEVELS) if level in levels), None)
    if weakest is None:
        return Check(ok=True, detail="no worker has been seen lately")
    facts = {"weakest": weakest, "minimum": settings.sandbox}
    if SANDBOX_LEVELS.index(weakest) > SANDBOX_LEVELS.index(settings.sandbox):
        wanted = f"MODELPRESS_SANDBOX={settings.sandbox} here asks for more"
        return Check(ok=False, detail=f"a worker runs jobs at level {weakest}; {wanted}", facts=facts)
    return Check(ok=True, detail=_SANDBOX_DETAILS[weakest], facts=facts)
