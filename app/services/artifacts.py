"""Artifacts by id."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.db import job_queries
from app.db.tables import Artifact
from app.errors import NotFound


def require_artifact(session: Session, artifact_id: str) -> Artifact:
    """An artifact. Raises NotFound."""
    artifact = job_queries.get_artifact(session, artifact_id)
    if artifact is None:
        raise NotFound(
            f"There is no artifact {artifact_id}.",
            hint="A job's `artifacts` lists those it left; deleting the job removes them.",
        )
    return artifact
