"""Is the service alive, and can it work?"""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(prefix="/health", tags=["ops"])


@router.get("/live", operation_id="get_liveness")
def get_liveness() -> dict[str, str]:
    """Say that this process answers. Asks no dependency: a broken database is no reason to restart the API."""
    return {"status": "ok"}
