"""The disk: room that is left on it, and what is on it for good."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_free(directory: Path, wanted: int, min_free_bytes: int) -> None:
    """Raise StorageFull if `wanted` more bytes would leave less than `min_free_bytes` on the disk."""
    free = shutil.disk_usage(directory).free
    if free - wanted < min_free_bytes:
        raise StorageFull(
            f"{wanted} bytes do not fit: the disk has {free} bytes free, of which {min_free_bytes} are kept free.",
            hint="Delete models, datasets and jobs you no longer need, or give the service a larger disk.",
        )


@contextmanager
def full_disk_translated() -> Iterator[None]:
    """Turn the system's word for a full disk, quota or file size limit into StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFull(
            "The disk is full; what had been written of this file was removed.",
            hint="Delete models, datasets and jobs you no longer need, or give the service a larger disk.",
        ) from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def probe_disk(directory: Path) -> None:
    """Write a few bytes and sync them. Raises OSError where that cannot be done."""
    with tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(b"modelpress")
        probe.flush()
        os.fsync(probe.fileno())
