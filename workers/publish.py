"""Move what a job wrote into the store, under the hash of its content, and name it for the database."""

from __future__ import annotations

import hashlib
import mimetypes
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from app.db import job_claims, model_queries
from app.db.job_claims import Claim
from app.db.tables import Artifact
from app.errors import JobFailed
from app.ids import new_id
from app.storage import ArtifactStore
from app.storage.store import Beat

_CHUNK_BYTES = 2**20
_MAX_FILES = 10_000
_PLAIN_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,1024}")
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
    job_id: str, *, model: Path, report: Path, store: ArtifactStore, beat: Beat
) -> list[Published]:
    """Store every file of a result and its reports; `beat` is called all the while, since large files take long.

    Safe to repeat. Nothing is visible until `publish` commits.
    """
    published = []
    files = [*_model_files(model), *_report_files(report)]
    _check_files([path for path, *_ in files], model.parents[1])
    for path, kind, name, media_type in files:
        sha256 = _digest(path, beat)
        store.put_file(path, sha256, beat=beat)
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
    return published


def publish(
    session: Session, claim: Claim, files: Sequence[Published], *, verdict: str, store: ArtifactStore
) -> bool:
    """End a job well and make its files visible, in the caller's transaction. False: lease lost, or cancelled."""
    # Between store_files and now somebody may have deleted the last other reference to one of these blobs, and with
    # it the blob. Under the lock nobody can.
    model_queries.hold_blobs(session)
    for file in files:
        if not store.exists(file.artifact.sha256):
            store.put_file(file.path, file.artifact.sha256)
    return job_claims.succeed(session, claim, verdict=verdict, artifacts=[file.artifact for file in files])


def _digest(path: Path, beat: Beat) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            beat()
    return digest.hexdigest()


def _check_files(paths: Sequence[Path], stages: Path) -> None:
    """Raise JobFailed unless all are regular files below `stages` with plain names.

    The job's process wrote them. Its links are not followed: they may lead to what it could not read itself.
    """
    root = stages.resolve()
    if len(paths) > _MAX_FILES:
        raise _tampered(f"{len(paths)} files")
    for path in paths:
        name = path.relative_to(stages).as_posix()
        if not _PLAIN_NAME.fullmatch(name):
            raise _tampered("a file with an impossible name")
        is_inside = path.resolve() == root / name
        if not is_inside or not stat.S_ISREG(path.lstat().st_mode):
            raise _tampered(f"{name}, which is no regular file")


def _tampered(what: str) -> JobFailed:
    return JobFailed(
        f"The job's process left {what}; it may have been tampered with.",
        code="result_refused",
        hint="Upload the model again from where you trust it.",
    )


def _model_files(model: Path) -> Iterator[tuple[Path, str, str, str]]:
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        yield path, "model", path.relative_to(model).as_posix(), media_type


def _report_files(report: Path) -> Iterator[tuple[Path, str, str, str]]:
    for name, (kind, media_type) in REPORTS.items():
        yield report / name, kind, name, media_type
