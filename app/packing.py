"""A model's directory as one file: an uncompressed tar, the same bytes for the same files, so an upload can resume."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def packed(path: Path) -> Iterator[Path]:
    """The file itself, or a directory's files as a tar that is removed when the block ends. Hidden files are left out."""
    if path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="modelpress-") as directory:
        archive = Path(directory) / f"{path.resolve().name}.tar"
        with tarfile.open(archive, "w", dereference=True) as tar:
            for member in sorted(_members(path)):
                tar.add(member, member.relative_to(path).as_posix(), filter=_without_traces)
        yield archive


def _members(root: Path) -> Iterator[Path]:
    """Files below `root`; links are followed, as model caches are made of them."""
    for path in root.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


def _without_traces(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owner, mode and time are this machine's business and would change the bytes."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member
