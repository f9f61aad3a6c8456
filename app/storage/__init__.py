"""Where bytes are kept: an ArtifactStore addressed by content, and the staging area beside it."""

from __future__ import annotations

from app.settings import get_settings
from app.storage.local import LocalStore
from app.storage.staging import Staging
from app.storage.store import ArtifactStore

__all__ = ["ArtifactStore", "LocalStore", "Staging", "get_staging", "get_store"]


def get_store() -> LocalStore:
    """The store of this process."""
    settings = get_settings()
    return LocalStore(settings.data_dir.absolute(), min_free_bytes=settings.min_free_disk_bytes)


def get_staging() -> Staging:
    """The staging area of this process, on the same disk as the store so that files move without a copy."""
    settings = get_settings()
    return Staging(settings.data_dir.absolute() / "staging", min_free_bytes=settings.min_free_disk_bytes)
