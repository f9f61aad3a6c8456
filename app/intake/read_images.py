"""Turn a dataset of images into the one form the engine reads: a safetensors file of `images` and, if any, `labels`.

An .npz is unpacked stream by stream, within the caps of any archive, and never by NumPy; a .safetensors is copied. Images
are uint8, (images, height, width, channels) or (images, channels, height, width), and stay as they lie. Labels become
int64.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.intake.byte_stream import ByteStream
from app.intake.limits import ArchiveLimits, Entry
from app.intake.npy_header import ITEM_BYTES, ArrayHeader, read_npy_header
from app.intake.refusals import refused
from app.intake.safetensors_header import header_bytes, read_header
from app.intake.zip_reader import read_zip
from app.spec.image_set import ImageSetFacts, Layout
from app.spec.preprocessing import MAX_EDGE

ImageFormat = Literal["npz", "safetensors"]

_IMAGES, _LABELS = ("images", "x"), ("labels", "y")
_CHANNELS = (1, 3)
_READ_BYTES = 2**20
_TYPE_CODES = {
    "U8": "B", "I8": "b", "U16": "H", "I16": "h", "U32": "I", "I32": "i", "U64": "Q", "I64": "q",
}  # fmt: skip
_MAX_LABEL = 2**31 - 1
# Their labels are held in memory.
_MAX_IMAGES = 10_000_000


@dataclass(frozen=True)
class _Stored:
    """An array in a file: what its header says, and its bytes, opened anew each time."""

    name: str
    header: ArrayHeader
    chunks: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class ReadImages:
    """A set of images that was accepted."""

    facts: ImageSetFacts
    chunks: Callable[[], Iterator[bytes]]
    """The normalised file, piece by piece. Raises IntakeError where an archive is damaged further on."""


def read_images(path: Path, name: str, form: ImageFormat, *, max_bytes: int) -> ReadImages:
    """Check a file of images by its headers and its labels. Raises IntakeError."""
    stored = _in_npz(path, max_bytes) if form == "npz" else _in_safetensors(path, name)
    images = _named(stored, _IMAGES)
    if images is None:
        found = ", ".join(sorted(stored))[:200] or "none"
        raise refused("images_invalid", f"{name} has no array called images or x; it has: {found}.")
    layout, sizes = _layout(images)
    labels = _named(stored, _LABELS)
    numbers = None if labels is None else _labels(labels, images.header.shape[0])
    largest = None if numbers is None else max(numbers)
    facts = ImageSetFacts(images=images.header.shape[0], **sizes, layout=layout, largest_label=largest)
    return ReadImages(facts, lambda: _normalised(images, numbers, layout))


def _named(stored: dict[str, _Stored], names: tuple[str, ...]) -> _Stored | None:
    found = [stored[name] for name in names if name in stored]
    if len(found) > 1:
        raise refused("images_invalid", f"There is both {names[0]} and {names[1]}: leave one out.")
    return found[0] if found else None


def _layout(images: _Stored) -> tuple[Layout, dict[str, int]]:
    shape = images.header.shape
    if images.header.dtype != "U8" or len(shape) != 4 or shape[0] == 0:
        raise refused(
            "images_invalid",
            f"{images.name} is {images.header.dtype} of shape {list(shape)}; images are uint8 of four dimensions.",
        )
    last, second = shape[3] in _CHANNELS, shape[1] in _CHANNELS
    if last == second:
        why = "both the second and the last" if last else "neither the second nor the last"
        raise refused(
            "images_invalid", f"{images.name} is {list(shape)}: {why} dimension could be the channels."
        )
    if shape[0] > _MAX_IMAGES:
        raise refused("images_invalid", f"{images.name} holds {shape[0]} images; {_MAX_IMAGES} are read.")
    layout: Layout = "NHWC" if last else "NCHW"
    channels, (height, width) = (shape[3], shape[1:3]) if last else (shape[1], shape[2:4])
    if not 0 < height <= MAX_EDGE or not 0 < width <= MAX_EDGE:
        raise refused("images_invalid", f"Images of {height} by {width} are not read; up to {MAX_EDGE} are.")
    return layout, {"height": height, "width": width, "channels": channels}


def _labels(labels: _Stored, images: int) -> array.array[int]:
    """All of them, int64. They are few and small: eight bytes an image."""
    shape = labels.header.shape
    if shape not in ((images,), (images, 1)):
        raise refused("images_invalid", f"{labels.name} is {list(shape)}, and there are {images} images.")
    raw = array.array(_TYPE_CODES[labels.header.dtype])
    raw.frombytes(b"".join(labels.chunks()))
    if min(raw) < 0 or max(raw) > _MAX_LABEL:
        raise refused("images_invalid", f"{labels.name} has labels from {min(raw)} to {max(raw)}.")
    return array.array("q", raw)


def _normalised(images: _Stored, labels: array.array[int] | None, layout: Layout) -> Iterator[bytes]:
    tensors = {"images": ("U8", images.header.shape)}
    if labels is not None:
        tensors["labels"] = ("I64", (len(labels),))
    yield header_bytes(tensors, {"layout": layout})
    yield from images.chunks()
    if labels is not None:
        yield labels.tobytes()


def _in_npz(path: Path, max_bytes: int) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for entry in read_zip(path, _limits(path, max_bytes)):
        key = entry.name.removesuffix(".npy")
        if key in found:
            raise refused("archive_duplicate", f"{entry.name[:100]!r} is in the archive twice.")
        if key in (*_IMAGES, *_LABELS):
            with closing(ByteStream(entry.chunks)) as stream:
                header = read_npy_header(stream.read, entry.name)
            found[key] = _Stored(key, header, _opening(path, max_bytes, entry.name, header))
    return found


def _limits(path: Path, max_bytes: int) -> ArchiveLimits:
    return ArchiveLimits(max_bytes=max_bytes, archive_bytes=path.stat().st_size)


def _opening(path: Path, max_bytes: int, name: str, header: ArrayHeader) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        # The archive is open for as long as its entries are gone through.
        for entry in read_zip(path, _limits(path, max_bytes)):
            if entry.name == name:
                yield from _elements(entry, header)

    return chunks


def _elements(entry: Entry, header: ArrayHeader) -> Iterator[bytes]:
    """The bytes behind an array's header: exactly as many as it promises."""
    left = header.nbytes
    with closing(ByteStream(entry.chunks)) as stream:
        read_npy_header(stream.read, entry.name)
        while piece := stream.read(min(_READ_BYTES, left + 1)):
            left -= len(piece)
            if left < 0:
                raise refused("images_invalid", f"{entry.name} has bytes behind its last element.")
            yield piece
    if left:
        raise refused("truncated", f"{entry.name} ends {left} bytes before its last element.")


def _in_safetensors(path: Path, name: str) -> dict[str, _Stored]:
    tensors = read_header(path, name)
    # The header was checked: tensors lie one behind the other to the end of the file.
    at = path.stat().st_size - sum(t.nbytes for t in tensors)
    found: dict[str, _Stored] = {}
    for tensor in tensors:
        if tensor.name in (*_IMAGES, *_LABELS):
            if tensor.dtype not in ITEM_BYTES:
                raise refused(
                    "images_invalid", f"{tensor.name} is {tensor.dtype}; images are uint8, labels integers."
                )
            header = ArrayHeader(tensor.dtype, tensor.shape)
            found[tensor.name] = _Stored(tensor.name, header, _range(path, at, header.nbytes))
        at += tensor.nbytes
    return found


def _range(path: Path, start: int, length: int) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            left = length
            while left and (piece := file.read(min(_READ_BYTES, left))):
                left -= len(piece)
                yield piece

    return chunks
