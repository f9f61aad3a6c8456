"""Metrics for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response

from app.api.dependencies import ReadSession

router = APIRouter(tags=["ops"])


@router.get(
    "/metrics",
    operation_id="get_metrics",
    summary="Metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics(session: ReadSession) -> Response:
    """Queue depths, durations of jobs by technique and outcome, bytes and uploads, in Prometheus' text format."""
    # Its client brings an HTTP server along: a tenth of the API's start.
    from app.api.metric_families import CONTENT_TYPE, exposition

    return Response(exposition(session), media_type=CONTENT_TYPE)
