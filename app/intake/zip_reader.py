"""Read the files of a zip archive, one after another, trusting nothing its directory says.

Python's zipfile reads the central directory into memory whole, so its size is checked first, from the same record
that zipfile will use.
"""

from __future__ import annotations

import errno
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.intake.limits import ArchiveLimits, Entry
from app.intake.refusals import refused

# zipfile makes some ten times as many of it.
_MAX_DIRECTORY_BYTES = 4 * 2**20
# A PyTorch file has an entry for every tensor.
_MAX_NAMES = 100_000
_END_BYTES = 22
_MAX_COMMENT_BYTES = 65_535
_LOCATOR_BYTES = 20
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_READ_BYTES = 2**20
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    OverflowError,
    NotImplementedError,
    ValueError,
)


def read_zip(path: Path, limits: ArchiveLimits) -> Iterator[Entry]:
    """Each regular file: its name as it stands there, and its bytes. Raises IntakeError."""
    _check_directory(path)
    with _reading("The zip archive"):
        archive = zipfile.ZipFile(path)
    with archive:
        infos = archive.infolist()
        limits.check_entries(len(infos))
        for info in infos:
            _check_entry(info)
        for info in infos:
            if not info.is_dir():
                yield Entry(info.filename, _chunks(archive, info, limits))


def zip_names(path: Path) -> list[str]:
    """Names in the directory of a zip archive."""
    return [entry.name for entry in read_zip(path, ArchiveLimits(max_entries=_MAX_NAMES))]


def _chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: ArchiveLimits) -> Iterator[bytes]:
    limits.expect(info.file_size)
    unpacked = 0
    with _reading(repr(info.filename[:100])), archive.open(info) as file:
        while piece := file.read(_READ_BYTES):
            unpacked += len(piece)
            limits.add(len(piece))
            limits.check_ratio(unpacked, info.compress_size)
            yield piece


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn what zipfile raises on a broken archive into IntakeError."""
    try:
        yield
    except _BROKEN as error:
        raise refused("archive_corrupt", f"{what} cannot be unpacked: {error}.") from None
    except OSError as error:
        # It seeks to where the directory points, which may be before the start of the file.
        if error.errno != errno.EINVAL:
            raise
        raise refused(
            "archive_corrupt", f"{what} cannot be unpacked: it points outside the archive."
        ) from None


def _check_entry(info: zipfile.ZipInfo) -> None:
    name = info.filename[:100]
    if info.flag_bits & _ENCRYPTED:
        raise refused("archive_encrypted", f"{name!r} is encrypted.")
    if info.compress_type not in _METHODS:
        raise refused("archive_unsupported", f"{name!r} is packed by method {info.compress_type}.")
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        raise refused("archive_link", f"{name!r} is a symbolic link.")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise refused("archive_special_file", f"{name!r} is no regular file.")


def _check_directory(path: Path) -> None:
    """Refuse a central directory too large to be held in memory, before zipfile reads it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END_BYTES - _MAX_COMMENT_BYTES - _LOCATOR_BYTES))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END_BYTES:
            raise refused("truncated", "The zip archive has no end: it was cut short.")
        (directory_bytes,) = struct.unpack_from("<L", tail, at + 12)
        if at >= _LOCATOR_BYTES and tail[at - _LOCATOR_BYTES :][:4] == b"PK\x06\x07":
            (offset,) = struct.unpack_from("<Q", tail, at - _LOCATOR_BYTES + 8)
            directory_bytes = max(directory_bytes % 0xFFFFFFFF, _zip64_directory_bytes(file, offset, size))
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise refused("too_many_files", f"The directory of the zip archive has {directory_bytes} bytes.")


def _zip64_directory_bytes(file: IO[bytes], offset: int, size: int) -> int:
    if offset + 56 > size:
        raise refused("archive_corrupt", "The zip64 record points outside the archive.")
    file.seek(offset)
    (directory_bytes,) = struct.unpack_from("<Q", file.read(56), 40)
    return int(directory_bytes)
