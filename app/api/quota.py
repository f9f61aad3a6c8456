"""What the caller's tenant uses, and what it may use."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter

from app.api.dependencies import ReadSession
from app.db import quota_queries, worker_time
from app.services.job_view import as_time
from app.spec.documented import Documented

router = APIRouter(prefix="/quota", tags=["keys"])


class Usage(Documented):
    """One thing there is only so much of."""

    used: int
    limit: int | None
    """Null: as much as there is."""


class MonthlyUsage(Usage):
    """One thing there is only so much of each month."""

    refreshes_at: datetime
    """When it is counted anew: the first of next month, UTC."""


class Quota(Documented):
    """What a tenant uses and may use."""

    stored_bytes: Usage
    """Of models, datasets, artifacts and announced uploads."""
    queued_jobs: Usage
    running_jobs: Usage
    """Over this limit nothing is refused: jobs wait."""
    worker_seconds: MonthlyUsage
    """For which workers held your jobs this month, to the last heartbeat. Over this limit no job is accepted; those that were run."""


@router.get("", operation_id="get_quota", summary="See your quota")
def get_quota(session: ReadSession) -> Quota:
    """What your tenant uses, and where calls would be refused (403 `quota_stored_bytes` and `quota_worker_seconds`, 429
    `quota_queued_jobs`)."""
    limits = quota_queries.read_limits(session)
    queued, running = (quota_queries.count_jobs(session, status) for status in ("queued", "running"))
    seconds, month = worker_time.used_this_month(session)
    return Quota(
        stored_bytes=Usage(used=quota_queries.count_stored_bytes(session), limit=limits.stored_bytes),
        queued_jobs=Usage(used=queued, limit=limits.queued_jobs),
        running_jobs=Usage(used=running, limit=limits.running_jobs),
        worker_seconds=MonthlyUsage(
            used=round(seconds), limit=limits.worker_seconds, refreshes_at=as_time(month.end)
        ),
    )
