"""Format and size of a JPEG, PNG, WebP or BMP, read from its header; nothing is decoded.

ITU-T T.81 (JPEG), RFC 2083 (PNG), RFC 9649 (WebP); BMP by the headers that Windows and OS/2 wrote.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from app.intake.byte_stream import ByteStream
from app.intake.refusals import refused

PictureFormat = Literal["JPEG", "PNG", "WEBP", "BMP"]

_PNG = b"\x89PNG\r\n\x1a\n"
# Start of frame: every coding but 0xC4, 0xC8 and 0xCC, which are tables and reserved.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers without a length.
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}
_END_OF_HEADER = frozenset({0xD9, 0xDA})
# Fill bytes count as such: they are read one by one.
_MOST_MARKERS = 100_000


@dataclass(frozen=True)
class PictureHeader:
    """What a file says it is; pixels."""

    format: PictureFormat
    height: int
    width: int


def read_picture_header(stream: ByteStream, name: str) -> PictureHeader:
    """The header at the start of a file. Raises IntakeError where it is no picture of these formats."""
    head = stream.read(12)
    try:
        if head.startswith(b"\xff\xd8\xff"):
            return PictureHeader("JPEG", *_jpeg(stream, head))
        if head.startswith(_PNG):
            return PictureHeader("PNG", *_png(stream))
        if head.startswith(b"RIFF") and head[8:] == b"WEBP":
            return PictureHeader("WEBP", *_webp(stream))
        if head.startswith(b"BM"):
            return PictureHeader("BMP", *_bmp(stream))
    except (struct.error, ValueError):
        raise refused("picture_invalid", f"{name} has a broken header: its size cannot be read.") from None
    raise refused("picture_invalid", f"{name} is no JPEG, PNG, WebP or BMP.")


def _png(stream: ByteStream) -> tuple[int, int]:
    kind, width, height = struct.unpack(">4sII", stream.read(12))
    if kind != b"IHDR":
        raise ValueError("no header of this format")
    return height, width


def _bmp(stream: ByteStream) -> tuple[int, int]:
    stream.read(2)
    (size,) = struct.unpack("<I", stream.read(4))
    if size == 12:
        width, height = struct.unpack("<HH", stream.read(4))
    else:
        # Lines from top to bottom are told by a height below zero.
        width, height = struct.unpack("<ii", stream.read(8))
    if width < 0:
        raise ValueError("no header of this format")
    return abs(height), width


def _webp(stream: ByteStream) -> tuple[int, int]:
    kind, _ = struct.unpack("<4sI", stream.read(8))
    if kind == b"VP8X":
        _, canvas = struct.unpack("<I6s", stream.read(10))
        return int.from_bytes(canvas[3:], "little") + 1, int.from_bytes(canvas[:3], "little") + 1
    if kind == b"VP8L":
        signature, bits = struct.unpack("<BI", stream.read(5))
        if signature == 0x2F:
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        _, code, width, height = struct.unpack("<3s3sHH", stream.read(10))
        if code == b"\x9d\x01\x2a":
            return height & 0x3FFF, width & 0x3FFF
    raise ValueError("no header of this format")


def _jpeg(stream: ByteStream, head: bytes) -> tuple[int, int]:
    """Go from marker to marker up to the one that begins the frame."""
    held = _Held(stream, head[2:])
    is_marked = False
    for _ in range(_MOST_MARKERS):
        if not is_marked and held.read(1) != b"\xff":
            break
        (marker,) = struct.unpack("B", held.read(1))
        # Any number of them may fill the space before a marker.
        is_marked = marker == 0xFF
        if is_marked or marker in _BARE:
            continue
        if marker in _END_OF_HEADER:
            break
        (length,) = struct.unpack(">H", held.read(2))
        if marker in _FRAMES:
            _, height, width = struct.unpack(">BHH", held.read(5))
            return height, width
        held.skip(length - 2)
    raise ValueError("no header of this format")


class _Held:
    """A stream of which the first bytes were read already."""

    def __init__(self, stream: ByteStream, first: bytes) -> None:
        self._stream = stream
        self._first = first

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer at the end."""
        taken, self._first = self._first[:size], self._first[size:]
        return taken + self._stream.read(size - len(taken)) if len(taken) < size else taken

    def skip(self, size: int) -> None:
        """Go on behind so many bytes. Raises ValueError where there are fewer."""
        if size < 0 or len(self.read(size)) < size:
            raise ValueError("no header of this format")
