"""Move what a job wrote into the store, under the hash of its content, and name it for the database."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable, Iterator
from pathlib import Path

from app.db.tables import Artifact
from app.ids import new_id
from app.storage import ArtifactStore

REPORTS = {
    "report.json": ("report", "application/json"),
    "report.html": ("report_html", "text/html; charset=utf-8"),
}


def publish(
    job_id: str, *, model: Path, report: Path, store: ArtifactStore, beat: Callable[[], None]
) -> list[Artifact]:
    """Store every file of a result and its reports; `beat` is called after each, since large files take long.

    Safe to repeat: a file already in the store is not written again. Nothing is visible until the rows returned are
    committed.
    """
    artifacts = []
    for path, kind, name, media_type in [*_model_files(model), *_report_files(report)]:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        store.put_file(path, sha256)
        artifacts.append(
            Artifact(
                id=new_id("art"),
                job_id=job_id,
                kind=kind,
                path=name,
                media_type=media_type,
                sha256=sha256,
                bytes=size,
            )
        )
        beat()
    return artifacts


def _model_files(model: Path) -> Iterator[tuple[Path, str, str, str]]:
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        yield path, "model", path.relative_to(model).as_posix(), media_type


def _report_files(report: Path) -> Iterator[tuple[Path, str, str, str]]:
    for name, (kind, media_type) in REPORTS.items():
        yield report / name, kind, name, media_type
