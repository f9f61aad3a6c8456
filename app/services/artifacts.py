"""Artifacts by id."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.orm import Session

from app.db import job_queries
from app.db.tables import Artifact
from app.errors import Gone, NotFound
from app.services.job_view import as_time
from app.services.retention import read_retention


def require_artifact(session: Session, artifact_id: str) -> Artifact:
    """An artifact. Raises NotFound."""
    artifact = job_queries.get_artifact(session, artifact_id)
    if artifact is None:
        raise NotFound(
            f"There is no artifact {artifact_id}.",
            hint="A job's `artifacts` lists those it left; deleting the job removes them.",
        )
    return artifact


def require_content(session: Session, artifacts: Iterable[Artifact]) -> None:
    """Raise Gone (`artifact_expired`) unless the bytes of all of these are kept."""
    expired = next((artifact for artifact in artifacts if artifact.expired_at is not None), None)
    if expired is None or expired.expired_at is None:
        return
    days = read_retention(session).artifact_days
    kept = f": results are kept for {days} days" if days else ""
    raise Gone(
        f"{expired.path} expired at {as_time(expired.expired_at):%Y-%m-%dT%H:%M:%SZ}{kept}.",
        code="artifact_expired",
        hint=f"To have it made again, post a new job with the model and spec of {expired.job_id}.",
    )
