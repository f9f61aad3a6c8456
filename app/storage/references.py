"""Which blobs can go: those no row refers to."""

from __future__ import annotations

import time
from collections.abc import Collection

import structlog

from app.db import model_queries
from app.db.engine import Database
from app.errors import Unavailable
from app.storage.store import ArtifactStore

# Deleting in S3 takes two calls a blob, and others wait for the lock meanwhile.
_BATCH = 100

_log = structlog.get_logger(__name__)


def remove_unreferenced(database: Database, store: ArtifactStore, digests: Collection[str]) -> int:
    """Delete those of these blobs that no row of any tenant refers to. Returns how many. Call it outside any transaction.

    Safe beside others who put the same blob: they hold the same lock (`model_queries.hold_blobs`) from before they
    put it until the row that refers to it is committed.
    """
    # Another tenant's model may be made of the same blob.
    with database.for_service().write() as session:
        model_queries.hold_blobs(session)
        orphans = set(digests) - model_queries.referenced_blobs(session, digests)
        return sum(store.delete(sha256) for sha256 in sorted(orphans))


def discard_unreferenced(database: Database, store: ArtifactStore, digests: Collection[str]) -> None:
    """The same after what needed these blobs is gone: what cannot be removed now is left for the sweeper."""
    try:
        remove_unreferenced(database, store, digests)
    except Unavailable as error:
        _log.warning("blobs_left", count=len(digests), error=error.detail)


def remove_orphans(database: Database, store: ArtifactStore, *, older_than_seconds: float = 3600) -> int:
    """Delete blobs that no row refers to and nobody has put lately: what a process that died has left. For the sweeper."""
    before = time.time() - older_than_seconds
    old = [blob.sha256 for blob in store.iter_blobs() if blob.put_at < before]
    batches = (old[start : start + _BATCH] for start in range(0, len(old), _BATCH))
    return sum(remove_unreferenced(database, store, batch) for batch in batches)
