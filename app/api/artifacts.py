"""Artifacts: the files that jobs leave."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse

from app.api.bodies import FILE_ANSWERS, HEAD_ANSWERS
from app.api.dependencies import ReadSession
from app.api.problems import problem_responses
from app.api.streams import BlobResponse
from app.services import artifacts
from app.services.job_view import ArtifactView, artifact_view

router = APIRouter(prefix="/artifacts", tags=["artifacts"])

ArtifactId = Annotated[str, Path(pattern=r"^art_[0-9a-z]{1,40}$", description="Id of the artifact.")]


@router.get(
    "/{artifact_id}", operation_id="get_artifact", summary="See an artifact", responses=problem_responses(404)
)
def get_artifact(artifact_id: ArtifactId, session: ReadSession) -> ArtifactView:
    """Name, size, digest and links of a file that a job left."""
    return artifact_view(artifacts.require_artifact(session, artifact_id))


@router.head(
    "/{artifact_id}/content",
    operation_id="head_artifact_content",
    summary="Size and digest of an artifact",
    response_class=FileResponse,
    responses={**HEAD_ANSWERS, **problem_responses(404, 410)},
)
@router.get(
    "/{artifact_id}/content",
    operation_id="get_artifact_content",
    summary="Download an artifact",
    response_class=FileResponse,
    responses={**FILE_ANSWERS, **problem_responses(404, 410, 416)},
)
def get_artifact_content(artifact_id: ArtifactId, request: Request, session: ReadSession) -> BlobResponse:
    """The bytes. 410 once they have been kept for as long as the service keeps results. A download that broke off goes on with `Range: bytes=<n>-` and `If-Range: <ETag>`."""
    artifact = artifacts.require_artifact(session, artifact_id)
    artifacts.require_content(session, [artifact])
    return BlobResponse(artifact, request.method)
