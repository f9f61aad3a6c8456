"""Hands out imports by URL that are due to threads of this process, until it is told to stop."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import structlog

from app.db import import_queries as queries
from app.db.engine import Database
from app.errors import ModelpressError
from app.services.import_attempt import Attempt
from app.settings import Settings
from app.storage import get_staging
from app.storage.growing_file import GrowingFile

_IDLE_SECONDS = 1.0
_LOOKED_AT = 200

_log = structlog.get_logger(__name__)


def import_forever(database: Database, settings: Settings, stop: threading.Event) -> None:
    """Fetch until told to stop; what is under way then is given back within seconds."""
    running: set[Future[None]] = set()
    with ThreadPoolExecutor(settings.import_concurrency, thread_name_prefix="import") as pool:
        while not stop.wait(_IDLE_SECONDS):
            running = {future for future in running if not future.done()}
            try:
                while len(running) < settings.import_concurrency:
                    attempt = take_due(database, settings, stop)
                    if attempt is None:
                        break
                    running.add(pool.submit(attempt.run))
            except ModelpressError as error:
                _log.warning("imports_failed", code=error.code, error=error.detail)
            except Exception:  # noqa: BLE001 - logged with its trace
                # This thread hands out everybody's: whatever happened, it goes on.
                _log.exception("imports_failed")


def take_due(database: Database, settings: Settings, stop: threading.Event) -> Attempt | None:
    """Claim an import that is due and whose file is on this disk; None: there is none."""
    staging = get_staging()
    # However many one tenant has and however slow they are, there is room for another's.
    most = max(1, settings.import_concurrency - 1)
    with database.read() as session:
        due = queries.list_due(session, most_of_a_tenant=most, limit=_LOOKED_AT)
    for upload_id in due:
        try:
            file = GrowingFile(staging.upload_path(upload_id))
        except (FileNotFoundError, BlockingIOError, PermissionError):
            continue
        try:
            with database.write() as session:
                claim = queries.claim(session, upload_id, lease_seconds=settings.lease_seconds)
        except BaseException:
            file.close()
            raise
        if claim is not None:
            return Attempt(database, settings, claim, file, stop)
        file.close()
    return None
