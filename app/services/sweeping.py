"""What keeps a service clean that is killed in odd places: lost leases, lost messages, forgotten files.

Everything here may run in several processes at once, and may be killed at any line.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from itertools import takewhile

import structlog

from app.db import job_moves, job_queries
from app.db.engine import Database
from app.queue import enqueue_job
from app.services import direct_uploads
from app.services.loops import forever
from app.services.retention import expire
from app.services.uploads import remove_expired_uploads
from app.settings import Settings
from app.storage import get_store
from app.storage.references import remove_orphans

_ORPHANS_SECONDS = 3600
"""Between two looks for what has been kept long enough, and walks over all blobs for those that nothing refers to."""
_UNFINISHED_SECONDS = 86_400
"""A blob that has been on its way into the store for so long is not going to arrive."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What one sweep did."""

    lost: int
    sent: int
    scratch_removed: int


def sweep(database: Database, settings: Settings) -> Sweep:
    """Take jobs back from dead workers, send what was never sent, remove what nobody needs any more."""
    with database.write() as session:
        lost = job_moves.sweep_lost(session)
        due = job_moves.take_undispatched(session, stale_seconds=settings.redispatch_seconds)
    # Up to the first that the broker does not take: each attempt at one that is away takes seconds.
    sent = list(takewhile(lambda job: enqueue_job(*job), due))
    unsent = [job_id for job_id, _ in due[len(sent) :]]
    if unsent:
        with database.write() as session:
            job_moves.forget_dispatch(session, unsent)
    with database.write() as session:
        remove_expired_uploads(session)
    for job in lost:
        _log.warning("job_lost", job_id=job.job_id, status=job.status)
    return Sweep(len(lost), len(sent), remove_old_scratch(database, settings))


def sweep_forever(database: Database, settings: Settings, stop: threading.Event) -> None:
    """Sweep until told to stop; a dependency that is away is met again next time."""
    next_orphans = time.monotonic()

    def work() -> None:
        nonlocal next_orphans
        sweep(database, settings)
        if time.monotonic() >= next_orphans:
            next_orphans = time.monotonic() + _ORPHANS_SECONDS
            expire(database, settings)
            remove_orphans(database, get_store())
            get_store().remove_unfinished(older_than_seconds=_UNFINISHED_SECONDS)
            direct_uploads.remove_left(database)

    forever(work, stop, name="sweep", every_seconds=settings.sweep_seconds)


def remove_old_scratch(database: Database, settings: Settings) -> int:
    """Remove scratch directories of this machine whose jobs ended so long ago that a retry may start anew. Returns how many."""
    if not settings.scratch_dir.is_dir():
        return 0
    here = [entry.name for entry in settings.scratch_dir.iterdir()]
    with database.read() as session:
        over = job_queries.ended_among(session, here, seconds_ago=settings.scratch_retention_seconds)
    for name in over:
        shutil.rmtree(settings.scratch_dir / name, ignore_errors=True)
    return len(over)
