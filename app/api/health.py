"""Is the service alive, and can it work?"""

from __future__ import annotations

from fastapi import APIRouter, Response

from app.api.dependencies import CurrentSettings
from app.services.health import Readiness, RecentReadiness
from app.threads import HEALTH, PerLoop

router = APIRouter(prefix="/health", tags=["ops"])

_recent = PerLoop("readiness", RecentReadiness)


@router.get("/live", operation_id="get_liveness", summary="Is this process alive?")
async def get_liveness() -> dict[str, str]:
    """Say that this process answers. Asks no dependency: a broken database is no reason to restart the API."""
    return {"status": "ok"}


@router.get(
    "/ready",
    operation_id="get_readiness",
    summary="Can the service work?",
    responses={503: {"model": Readiness, "description": "A required dependency does not answer."}},
)
async def get_readiness(settings: CurrentSettings, response: Response) -> Readiness:
    """Ask database, storage, broker and workers; the answer holds for two seconds. 503 only when requests cannot be served.

    Without broker or workers the answer is `degraded`: jobs are accepted and wait.
    """
    readiness = await HEALTH.run(_recent().look, settings)
    if readiness.status == "unavailable":
        response.status_code = 503
    return readiness
