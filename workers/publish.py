"""Move what a job wrote into the store, under the hash of its content, and name it for the database."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from app.db import job_claims, model_queries
from app.db.job_claims import Claim
from app.db.tables import Artifact
from app.ids import new_id
from app.storage import ArtifactStore

REPORTS = {
    "report.json": ("report", "application/json"),
    "report.html": ("report_html", "text/html; charset=utf-8"),
}


@dataclass(frozen=True)
class Published:
    """A file in the store, and the row that will make it visible."""

    path: Path
    artifact: Artifact


def store_files(
    job_id: str, *, model: Path, report: Path, store: ArtifactStore, beat: Callable[[], None]
) -> list[Published]:
    """Store every file of a result and its reports; `beat` is called after each, since large files take long.

    Safe to repeat: a file already in the store is not written again. Nothing is visible until `publish` commits.
    """
    published = []
    for path, kind, name, media_type in [*_model_files(model), *_report_files(report)]:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        store.put_file(path, sha256)
        artifact = Artifact(
            id=new_id("art"),
            job_id=job_id,
            kind=kind,
            path=name,
            media_type=media_type,
            sha256=sha256,
            bytes=path.stat().st_size,
        )
        published.append(Published(path, artifact))
        beat()
    return published


def publish(
    session: Session, claim: Claim, files: Sequence[Published], *, verdict: str, store: ArtifactStore
) -> bool:
    """End a job well and make its files visible, in the caller's transaction. False: lease lost, or cancelled."""
    # Between store_files and now somebody may have deleted the last other reference to one of these blobs, and with
    # it the blob. Under the lock nobody can, and putting a blob that is there costs nothing.
    model_queries.hold_blobs(session)
    for file in files:
        store.put_file(file.path, file.artifact.sha256)
    return job_claims.succeed(session, claim, verdict=verdict, artifacts=[file.artifact for file in files])


def _model_files(model: Path) -> Iterator[tuple[Path, str, str, str]]:
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        yield path, "model", path.relative_to(model).as_posix(), media_type


def _report_files(report: Path) -> Iterator[tuple[Path, str, str, str]]:
    for name, (kind, media_type) in REPORTS.items():
        yield report / name, kind, name, media_type
