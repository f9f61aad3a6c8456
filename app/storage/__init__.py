"""Where bytes are kept: an ArtifactStore addressed by content, and the staging area beside it."""

from __future__ import annotations

from functools import lru_cache

from app.errors import InvalidRequest
from app.settings import Settings, get_settings
from app.storage.local import LocalStore
from app.storage.staging import Staging
from app.storage.store import ArtifactStore

__all__ = ["ArtifactStore", "LocalStore", "Staging", "forget_store", "get_staging", "get_store"]


def get_store() -> ArtifactStore:
    """The store of this process, as MODELPRESS_STORE says."""
    settings = get_settings()
    if settings.store:
        return _s3_store(settings)
    return LocalStore(settings.data_dir.absolute(), min_free_bytes=settings.min_free_disk_bytes)


def get_staging() -> Staging:
    """The staging area of this process, on the same disk as a local store so that files move without a copy."""
    settings = get_settings()
    return Staging(settings.data_dir.absolute() / "staging", min_free_bytes=settings.min_free_disk_bytes)


def forget_store() -> None:
    """Have the next store make its own connections: those from before a fork belong to the parent."""
    _s3_store.cache_clear()


@lru_cache(maxsize=1)
def _s3_store(settings: Settings) -> ArtifactStore:
    """Kept, since making a client takes longer than most calls on it."""
    try:
        # A third of the time that all of the API takes to import.
        from app.storage.s3 import S3Store
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"MODELPRESS_STORE is {settings.store}, but {error.name} is not installed.",
            code="no_s3",
            hint="pip install 'modelpress[s3]'",
        ) from None
    return S3Store(settings)
