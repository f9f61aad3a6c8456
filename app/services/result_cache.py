"""Results that are used again: a job that would do what an earlier one of its tenant did ends at once with its files.

What decides a result is the model, the resolved spec, the data and the version of the engine. A job carries a digest of
the first three from its submission on, and the version from the worker that ran it. What a person stopped early, what two
versions worked on and what missed its limits is never used again.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy.orm import Session

from app.db import job_moves, job_queries, model_queries, result_queries
from app.db.tables import Artifact, Dataset, Job, Model
from app.ids import new_id
from app.services.planning import NO_GPU, Planned
from app.services.quotas import require_storage
from app.version import engine_version


def result_key(session: Session, planned: Planned) -> str:
    """SHA-256 of all that decides the result but the engine's version: ids stand for bytes, and are replaced by their digests."""
    spec = planned.spec.model_dump(mode="json")
    for source in (spec["calibration"], spec["training"], spec["evaluation"]["text"]):
        if source["dataset"] is not None:
            source["dataset"] = _dataset(session, source["dataset"])
    for step in spec["steps"]:
        if (step.get("student") or {}).get("source") == "model":
            step["student"]["model"] = _model(session, step["student"]["model"])
    decides = {"model": _model(session, planned.model.id), "spec": spec}
    return hashlib.sha256(json.dumps(decides, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def reuse_result(session: Session, job: Job, stages: tuple[str, ...]) -> bool:
    """Make `job` and end it with the result of an earlier one; both refer to the same blobs. False: there is none.

    Raises QuotaExceeded when the tenant may not store the result once more.
    """
    if _find(session, job) is None:
        return False
    # What is found from here on keeps its blobs until this transaction ends.
    model_queries.hold_blobs(session)
    earlier = _find(session, job)
    if earlier is None:
        return False
    artifacts = [_copy(job.id, artifact) for artifact in job_queries.list_artifacts(session, earlier.id)]
    require_storage(session, sum(artifact.bytes for artifact in artifacts))
    job.warnings = [warning for warning in earlier.warnings if warning != NO_GPU]
    job_moves.create_job(session, job, stages)
    job_moves.succeed_as(session, job.id, earlier, artifacts)
    return True


def _find(session: Session, job: Job) -> Job | None:
    if job.result_key is None:
        return None
    return result_queries.find_result(session, job.result_key, engine_version=engine_version())


def _model(session: Session, model_id: str) -> list[Any]:
    """With its facts, which jobs are told: another version may have read others from the same files."""
    model = session.get_one(Model, model_id)
    return [model.sha256, model.facts]


def _dataset(session: Session, dataset_id: str) -> list[Any]:
    dataset = session.get_one(Dataset, dataset_id)
    return [dataset.sha256, dataset.format, dataset.images, dataset.texts]


def _copy(job_id: str, artifact: Artifact) -> Artifact:
    return Artifact(
        id=new_id("art"),
        job_id=job_id,
        kind=artifact.kind,
        path=artifact.path,
        media_type=artifact.media_type,
        sha256=artifact.sha256,
        bytes=artifact.bytes,
    )
