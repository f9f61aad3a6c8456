"""Read the files of a tar archive, one after another, from a stream.

Python's tarfile reads a long name or an extended header into memory whatever size it claims, which a gzip of a few
kilobytes can make gigabytes, and its filters have been got around. A tar of plain files needs little more than this.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

from app.intake.limits import ArchiveLimits, Entry
from app.intake.names import MAX_PATH_BYTES
from app.intake.refusals import refused

_BLOCK = 512
_READ_BYTES = 2**20
_MAX_EXTENDED_BYTES = 64 * 2**10
_MAX_ALL_EXTENDED_BYTES = 4 * 2**20
_PAX = re.compile(rb"(\d{1,10}) ([^=\n]+)=")
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2", b"K")
_BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


def read_tar(path: Path, limits: ArchiveLimits, *, gzipped: bool) -> Iterator[Entry]:
    """Each regular file: its name as it stands there, and its bytes, to be read before the next. Raises IntakeError."""
    opened: _Readable = gzip.open(path, "rb") if gzipped else path.open("rb")  # noqa: SIM115 - closed by the next line
    with closing(opened) as stream:
        yield from _Tar(stream, limits).entries()


class _Tar:
    """One pass over a tar stream. Counts every byte that comes out of it, headers and files left out too."""

    def __init__(self, stream: _Readable, limits: ArchiveLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._left = 0
        self._extended_bytes = 0

    def entries(self) -> Iterator[Entry]:
        """The regular files, in order."""
        count = 0
        overrides: dict[str, str] = {}
        while (header := self._read(_BLOCK)) != bytes(_BLOCK):
            count += 1
            self._limits.check_entries(count)
            _check_sum(header)
            size, kind = _number(header[124:136]), header[156:157]
            name = overrides.get("path") or _name(header)
            if kind in (b"L", b"x", b"g"):
                content = self._extended(size)
                if kind == b"L":
                    overrides["path"] = _text(content.rstrip(b"\0"))
                elif kind == b"x":
                    overrides |= _pax_records(content)
                continue
            _check_kind(kind, name)
            size = _pax_size(overrides, size)
            overrides = {}
            if kind == b"5":
                continue
            yield from self._file(name, size)

    def _file(self, name: str, size: int) -> Iterator[Entry]:
        self._limits.expect(size)
        self._left = size
        yield Entry(name, self._content())
        while self._left:
            self._left -= len(self._read_some(min(self._left, _READ_BYTES)))
        self._read(-size % _BLOCK)

    def _content(self) -> Iterator[bytes]:
        while self._left:
            piece = self._read_some(min(self._left, _READ_BYTES))
            self._left -= len(piece)
            yield piece

    def _extended(self, size: int) -> bytes:
        self._extended_bytes += size
        if size > _MAX_EXTENDED_BYTES or self._extended_bytes > _MAX_ALL_EXTENDED_BYTES:
            raise refused(
                "archive_corrupt", f"The tar archive has extended headers of {self._extended_bytes} bytes."
            )
        content = self._read(size)
        self._read(-size % _BLOCK)
        return content

    def _read(self, size: int) -> bytes:
        pieces = b""
        while len(pieces) < size:
            pieces += self._read_some(size - len(pieces))
        return pieces

    def _read_some(self, size: int) -> bytes:
        try:
            piece = self._stream.read(size)
        except _BROKEN as error:
            raise refused("truncated", f"The archive cannot be unpacked to its end: {error}.") from None
        if not piece:
            raise refused("truncated", "The tar archive ends in the middle of a file: it was cut short.")
        self._limits.add(len(piece))
        return piece


def _check_kind(kind: bytes, name: str) -> None:
    shown = name[:100]
    if kind in _LINKS:
        raise refused("archive_link", f"{shown!r} is a link.")
    if kind != b"5" and kind not in _REGULAR:
        raise refused("archive_special_file", f"{shown!r} is no regular file (tar type {kind!r}).")


def _check_sum(header: bytes) -> None:
    expected = _number(header[148:156])
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != expected:
        raise refused("archive_corrupt", "A header of the tar archive has a wrong checksum.")


def _number(raw: bytes) -> int:
    """A number in octal, or in base 256 where it did not fit."""
    if raw[0] & 0x80:
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
        if value >= 2**63:
            raise refused("archive_corrupt", "A header of the tar archive has an impossible number.")
        return value
    text = raw.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise refused("archive_corrupt", "A header of the tar archive has a number that is none.")
    return int(text or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = (
        header[345:500].split(b"\0", 1)[0]
        if header[257:262] == b"ustar" and header[263:265] == b"00"
        else b""
    )
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    if len(raw) > MAX_PATH_BYTES:
        raise refused("archive_unsafe_path", "A name in the tar archive is too long.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise refused("archive_unsafe_path", "A name in the tar archive is not UTF-8.") from None


def _pax_records(content: bytes) -> dict[str, str]:
    """`path` and `size` of a pax header; sparse files are refused, whatever else there is changes nothing for us."""
    found: dict[str, str] = {}
    content = content.rstrip(b"\0")
    at = 0
    while at < len(content):
        match = _PAX.match(content, at)
        length = int(match[1]) if match else 0
        if match is None or at + length > len(content) or length <= match.end() - at:
            raise refused("archive_corrupt", "An extended header of the tar archive cannot be read.")
        key, value = match[2], content[match.end() : at + length - 1]
        if key.startswith(b"GNU.sparse"):
            raise refused("archive_special_file", "The tar archive holds a sparse file.")
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value)
        at += length
    return found


def _pax_size(overrides: dict[str, str], size: int) -> int:
    text = overrides.get("size", str(size))
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise refused("archive_corrupt", "An extended header of the tar archive has an impossible size.")
    return int(text)
