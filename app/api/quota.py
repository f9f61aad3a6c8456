"""What the caller's tenant uses, and what it may use."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import ReadSession
from app.db import quota_queries
from app.spec.documented import Documented

router = APIRouter(prefix="/quota", tags=["keys"])


class Usage(Documented):
    """One thing there is only so much of."""

    used: int
    limit: int | None
    """Null: as much as there is."""


class Quota(Documented):
    """What a tenant uses and may use."""

    stored_bytes: Usage
    """Of models, datasets, artifacts and announced uploads."""
    queued_jobs: Usage
    running_jobs: Usage
    """Over this limit nothing is refused: jobs wait."""


@router.get("", operation_id="get_quota", summary="See your quota")
def get_quota(session: ReadSession) -> Quota:
    """What your tenant uses, and where calls would be refused (403 `quota_stored_bytes`, 429 `quota_queued_jobs`)."""
    limits = quota_queries.read_limits(session)
    queued, running = (quota_queries.count_jobs(session, status) for status in ("queued", "running"))
    return Quota(
        stored_bytes=Usage(used=quota_queries.count_stored_bytes(session), limit=limits.stored_bytes),
        queued_jobs=Usage(used=queued, limit=limits.queued_jobs),
        running_jobs=Usage(used=running, limit=limits.running_jobs),
    )
