"""Unpack an archive: regular files under checked names, within caps. What can be of no use is not even written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.intake.limits import ArchiveLimits
from app.intake.names import may_be_kept, refuse_file_as_folder, safe_path
from app.intake.refusals import refused
from app.intake.tar_reader import read_tar
from app.intake.zip_reader import read_zip

ArchiveKind = Literal["zip", "tar", "tar.gz"]
WriteFile = Callable[[str, Iterator[bytes]], object]


@dataclass(frozen=True)
class Unpacked:
    """Names of the files that were written, and of those that could be of no use, as they stand in the archive."""

    written: tuple[str, ...]
    skipped: tuple[str, ...]


def unpack(path: Path, kind: ArchiveKind, *, write: WriteFile, max_bytes: int) -> Unpacked:
    """Hand each useful file to `write` under its checked name. Raises IntakeError; the caller removes what was written."""
    limits = ArchiveLimits(max_bytes=max_bytes, archive_bytes=path.stat().st_size)
    entries = read_zip(path, limits) if kind == "zip" else read_tar(path, limits, gzipped=kind == "tar.gz")
    seen: set[str] = set()
    folders: set[str] = set()
    written: list[str] = []
    skipped: list[str] = []
    for entry in entries:
        name = safe_path(entry.name)
        # Two names that differ in case alone would be one file on some disks.
        if name.casefold() in seen:
            raise refused("archive_duplicate", f"{name[:100]!r} is in the archive twice.")
        seen.add(name.casefold())
        refuse_file_as_folder(name.casefold(), seen, folders)
        if may_be_kept(name):
            write(name, entry.chunks)
            written.append(name)
        else:
            skipped.append(name)
    return Unpacked(tuple(written), tuple(skipped))
