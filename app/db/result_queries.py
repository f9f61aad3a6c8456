"""Which earlier job has the result that a new one would come to."""

from __future__ import annotations

from sqlalchemy import exists, not_, select
from sqlalchemy.orm import Session

from app.db.tables import Artifact, Job


def find_result(session: Session, result_key: str, *, engine_version: str) -> Job | None:
    """The tenant's newest job of this key and version whose result met its limits and is all there.

    Call it within `model_queries.hold_blobs` to refer to the blobs of what it finds: until that transaction ends they
    stay, even if the job is deleted or its files expire meanwhile.
    """
    has_expired = exists().where(Artifact.job_id == Job.id, Artifact.expired_at.is_not(None))
    query = (
        select(Job)
        .where(
            Job.result_key == result_key,
            Job.engine_version == engine_version,
            Job.status == "succeeded",
            Job.verdict != "rejected",
            not_(has_expired),
        )
        .order_by(Job.id.desc())
        .limit(1)
    )
    return session.scalars(query).one_or_none()
