"""Whether the store has what the database refers to: after a restore, or when a disk is not trusted any more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from app.db import model_queries
from app.db.engine import Database
from app.errors import NotFound
from app.storage.store import ArtifactStore

_READ_BYTES = 2**20


@dataclass(frozen=True)
class Fault:
    """A blob that is not what the database says, and who refers to it: `mdl_…/config.json`, `dst_…`, `job_…/report.json`."""

    sha256: str
    what: Literal["missing", "damaged"]
    wanted_by: tuple[str, ...]


def find_faults(database: Database, store: ArtifactStore, *, digests: bool) -> Iterator[Fault | None]:
    """Look at each blob that a row refers to; None for one that is well.

    Without `digests` a blob has only to be there; with them every byte is read.
    """
    with database.read() as session:
        wanted = model_queries.blobs_and_who_wants_them(session)
    for sha256, wanted_by in wanted.items():
        what = _look_at(store, sha256, digests=digests)
        yield None if what is None else Fault(sha256, what, wanted_by)


def _look_at(store: ArtifactStore, sha256: str, *, digests: bool) -> Literal["missing", "damaged"] | None:
    if not digests:
        return None if store.exists(sha256) else "missing"
    try:
        with store.open(sha256) as blob:
            digest = hashlib.sha256()
            while chunk := blob.read(_READ_BYTES):
                digest.update(chunk)
    except NotFound:
        return "missing"
    return None if digest.hexdigest() == sha256 else "damaged"
