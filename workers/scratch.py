"""A job's scratch directory: inputs, one directory a committed stage, one job file an attempt.

    scratch/<job>/inputs/model/…          the model's files: links into a local store, or fetched from S3
                  inputs/student/…        the uploaded student, if there is one
                  inputs/datasets/<id>    text
                  stages/02-5/…           files of stage 2, written under fence 5
                  journal/0/…             how far step 0 is, if it was killed; see the engine's block_journal
                  stop-training         there once training is to end at its best state so far
                  attempt-5.json          what the job's process is told
                  attempt-5.log           what it and its libraries printed

A stage's directory carries the fence it was written under, so a worker that lost its lease can never touch the files
of the one that took over.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.db import job_queries, model_queries
from app.db.tables import Job
from app.errors import JobFailed
from app.settings import Settings
from app.spec.compression import CompressionSpec
from app.storage import ArtifactStore
from app.storage.store import Beat, still

STOP_FILE = "stop-training"
STAGE_FILE = "stage.json"
"""Written last: a stage's directory without it is unfinished."""


@dataclass(frozen=True)
class Blob:
    """A file of the store and where the job wants it, relative to its inputs directory."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All a supervisor needs to know of a job, read once when it is claimed."""

    spec: CompressionSpec
    model_name: str
    model_sha256: str
    facts: dict[str, Any]
    student_facts: dict[str, Any] | None
    inputs: tuple[Blob, ...]
    directories: tuple[str, ...]
    """Of the committed stages, in order."""
    traits: dict[str, str | int | float]
    """Of the job and its model, for spans."""


def read_assignment(session: Session, job_id: str) -> Assignment:
    """Read a claimed job. Raises JobFailed when what it needs has been deleted."""
    job = session.get_one(Job, job_id)
    spec = CompressionSpec.model_validate(job.spec)
    model = model_queries.get_model(session, job.model_id)
    if model is None:
        raise JobFailed(
            "The model of this job has been deleted.", code="input_deleted", hint="Upload it again."
        )
    blobs = _model_blobs(session, job.model_id, "model")
    student = spec.student_model_id()
    student_facts = None
    if student is not None:
        blobs += _model_blobs(session, student, "student")
        student_model = model_queries.get_model(session, student)
        student_facts = student_model.facts if student_model else None
    for dataset_id in sorted(spec.dataset_ids()):
        dataset = model_queries.get_dataset(session, dataset_id)
        if dataset is None:
            raise JobFailed(
                f"Dataset {dataset_id} has been deleted.", code="input_deleted", hint="Upload it again."
            )
        blobs.append(Blob(f"datasets/{dataset_id}", dataset.sha256))
    stages = job_queries.list_stages(session, job_id)
    return Assignment(
        spec=spec,
        model_name=job.model_name,
        model_sha256=model.sha256,
        facts=model.facts,
        student_facts=student_facts,
        inputs=tuple(blobs),
        directories=tuple(s.directory for s in stages if s.directory is not None),
        traits={
            "tenant": job.tenant_id,
            "job.technique": job.technique,
            "job.queue": job.queue,
            "job.queued_seconds": (job.started_at or job.queued_at) - job.queued_at,
            "model.architecture": model.architecture,
            "model.bytes": model.bytes,
        },
    )


def _model_blobs(session: Session, model_id: str, below: str) -> list[Blob]:
    files = model_queries.list_model_files(session, model_id)
    if not files:
        raise JobFailed(f"Model {model_id} has been deleted.", code="input_deleted", hint="Upload it again.")
    return [Blob(f"{below}/{file.path}", file.sha256) for file in files]


class Scratch:
    """The scratch directory of one job."""

    def __init__(self, settings: Settings, job_id: str) -> None:
        self.job_id = job_id
        self.directory = settings.scratch_dir / job_id

    def fetch_inputs(
        self, assignment: Assignment, store: ArtifactStore, fence: int, *, beat: Beat = still
    ) -> None:
        """Bring the inputs here, all or nothing; what an earlier attempt fetched is used again."""
        inputs = self.directory / "inputs"
        if inputs.exists():
            return
        arriving = self.directory / f"inputs-{fence}"
        try:
            for blob in assignment.inputs:
                store.materialize(blob.sha256, arriving / blob.path, beat=beat)
        except BaseException:
            shutil.rmtree(arriving, ignore_errors=True)
            raise
        try:
            arriving.rename(inputs)
        except OSError:
            if not inputs.exists():
                raise
            shutil.rmtree(arriving)

    def finished_stages(self, directories: tuple[str, ...]) -> int:
        """How many of the committed stages have their files on this worker, counted from the first."""
        for number, name in enumerate(directories):
            if not (self.stages / name / STAGE_FILE).is_file():
                return number
        return len(directories)

    def write_job_file(
        self,
        assignment: Assignment,
        *,
        committed: tuple[str, ...],
        fence: int,
        settings: Settings,
        device: str,
    ) -> Path:
        """Write what the job's process is told, and return where."""
        self.stages.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"attempt-{fence}.json"
        content = {
            "job_id": self.job_id,
            "model_name": assignment.model_name,
            "model_sha256": assignment.model_sha256,
            "spec": assignment.spec.model_dump(mode="json"),
            "facts": assignment.facts,
            "student_facts": assignment.student_facts,
            "inputs": str(self.directory / "inputs"),
            "stages": str(self.stages),
            "stop_file": str(self._stop_file),
            "fence": fence,
            "committed": committed,
            "device": device,
            "threads": settings.worker_threads,
            "memory_budget": settings.memory_for(assignment.spec.resources.memory_budget),
        }
        path.write_text(json.dumps(content))
        return path

    def stop_training(self) -> None:
        """Tell the job's process to train no more, and go on with the best state so far."""
        # Never through a link: the process could have put one there.
        with suppress(FileExistsError):
            os.close(os.open(self._stop_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))

    def let_train(self) -> None:
        """Take that back, for an attempt of which nobody has asked it."""
        self._stop_file.unlink(missing_ok=True)

    @property
    def _stop_file(self) -> Path:
        return self.directory / STOP_FILE

    @property
    def stages(self) -> Path:
        """Where stages leave their files."""
        return self.directory / "stages"

    def log_file(self, fence: int) -> Path:
        """What the job's process and its libraries print."""
        return self.directory / f"attempt-{fence}.log"

    def log_tail(self, fence: int, lines: int = 3) -> str:
        """The end of what the job's process printed."""
        path = self.log_file(fence)
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4000))
            text = file.read().decode(errors="replace")
        return " | ".join(text.strip().splitlines()[-lines:])

    def remove(self) -> None:
        """Remove all of it; what a worker that lost its lease still adds is left for the sweeper."""
        shutil.rmtree(self.directory, ignore_errors=True)
