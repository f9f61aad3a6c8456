"""Turn an archive of picture files into the form the engine reads: a safetensors file of the files as they are.

`pictures` are their bytes one behind the other, in the archive's order, `ends` where each ends, `names` their paths, a line
each. `order` is the order to read them in: drawn by a digest of the paths, since archives go class by class and a job may
take the first few. `labels` are the folders, in their sorted order, where pictures lie in several; folders named by numbers
are those numbers. No picture is decoded: of each its header is read. A file that is no picture is refused, but for notes.
"""

from __future__ import annotations

import array
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from app.intake.byte_stream import ByteStream
from app.intake.limits import ArchiveLimits, Entry
from app.intake.names import safe_path
from app.intake.picture_header import PictureHeader, read_picture_header
from app.intake.refusals import refused
from app.intake.safetensors_header import header_bytes
from app.intake.tar_reader import read_tar
from app.intake.zip_reader import read_zip
from app.spec.image_set import MAX_PICTURE_PIXELS, ImageSetFacts

PicturesFormat = Literal["zip", "tar", "tar.gz"]

_MAX_PICTURES = 100_000
_MAX_PICTURE_BYTES = 64 * 2**20
_MAX_CLASSES = 10_000
_READ_BYTES = 2**20
# What systems and people leave beside pictures.
_NOTE = re.compile(r"(?:\..*|Thumbs\.db|desktop\.ini|.*\.(?:txt|md|csv|tsv|json|jsonl|html))", re.IGNORECASE)
_NOTES_FOLDER = "__MACOSX"
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass
class ReadPictures:
    """Pictures in an archive that was gone through once."""

    path: Path
    form: PicturesFormat
    max_bytes: int
    names: list[str] = field(default_factory=list)
    ends: array.array[int] = field(default_factory=lambda: array.array("q"))
    smallest: tuple[int, int] = (2**31, 2**31)
    """Least height and least width."""
    labels: array.array[int] | None = None
    label_names: tuple[str, ...] | None = None

    @property
    def facts(self) -> ImageSetFacts:
        """What is known of them."""
        return ImageSetFacts(
            images=len(self.names),
            height=self.smallest[0],
            width=self.smallest[1],
            channels=None,
            layout="files",
            largest_label=None if self.labels is None else max(self.labels),
            label_names=self.label_names,
        )

    def chunks(self) -> Iterator[bytes]:
        """The normalised file, piece by piece."""
        count, names = len(self.names), "\n".join(self.names).encode()
        tensors = {"ends": ("I64", (count,)), "order": ("I64", (count,))}
        if self.labels is not None:
            tensors["labels"] = ("I64", (count,))
        tensors |= {"names": ("U8", (len(names),)), "pictures": ("U8", (self.ends[-1],))}
        metadata = {"layout": "files"}
        if self.label_names is not None:
            metadata["label_names"] = json.dumps(self.label_names)
        yield header_bytes(tensors, metadata)
        yield self.ends.tobytes() + _drawn(self.names).tobytes()
        if self.labels is not None:
            yield self.labels.tobytes()
        yield names
        for entry in self.entries():
            yield from entry.chunks

    def entries(self) -> Iterator[Entry]:
        """The files that are pictures, or should be, under checked names."""
        limits = ArchiveLimits(
            max_bytes=self.max_bytes, max_entries=_MAX_PICTURES, archive_bytes=self.path.stat().st_size
        )
        gzipped = self.form == "tar.gz"
        found = (
            read_zip(self.path, limits)
            if self.form == "zip"
            else read_tar(self.path, limits, gzipped=gzipped)
        )
        for entry in found:
            name = safe_path(entry.name)
            if not _is_note(name):
                yield Entry(name, entry.chunks)


def read_pictures(path: Path, form: PicturesFormat, *, max_bytes: int) -> ReadPictures:
    """Go through an archive of pictures, by their headers. Raises IntakeError."""
    found = ReadPictures(path, form, max_bytes)
    seen: set[str] = set()
    end = 0
    for entry in found.entries():
        if entry.name.casefold() in seen:
            raise refused("archive_duplicate", f"{entry.name[:100]!r} is in the archive twice.")
        seen.add(entry.name.casefold())
        header, size = _look(entry)
        end += size
        found.names.append(entry.name)
        found.ends.append(end)
        found.smallest = min(found.smallest[0], header.height), min(found.smallest[1], header.width)
    if not found.names:
        raise refused("images_invalid", "There are no pictures in the archive.", hint=_LAY_OUT)
    found.labels, found.label_names = _labels([str(PurePosixPath(name).parent) for name in found.names])
    return found


_LAY_OUT = "Pack the pictures of each class in a folder of its name (cat/1.jpg, dog/1.jpg), or all in one folder without classes."


def _is_note(name: str) -> bool:
    parts = name.split("/")
    return _NOTES_FOLDER in parts or _NOTE.fullmatch(parts[-1]) is not None


def _look(entry: Entry) -> tuple[PictureHeader, int]:
    """The header and the bytes of a picture, which is gone through to its end."""
    with closing(ByteStream(entry.chunks)) as stream:
        header = read_picture_header(stream, entry.name[:100])
        if not 0 < header.height * header.width <= MAX_PICTURE_PIXELS:
            raise refused(
                "picture_invalid",
                f"{entry.name[:100]} has {header.width} by {header.height} pixels; up to {MAX_PICTURE_PIXELS} in all are read.",
            )
        while stream.consumed <= _MAX_PICTURE_BYTES and stream.read(_READ_BYTES):
            pass
        if stream.consumed > _MAX_PICTURE_BYTES:
            raise refused("picture_invalid", f"{entry.name[:100]} has more than {_MAX_PICTURE_BYTES} bytes.")
        return header, stream.consumed


def _labels(folders: list[str]) -> tuple[array.array[int] | None, tuple[str, ...] | None]:
    """A label for each picture by its folder, and what they are called where that is no number; none for one folder."""
    distinct = sorted(set(folders))
    if len(distinct) == 1:
        return None, None
    if "." in distinct or len({str(PurePosixPath(folder).parent) for folder in distinct}) > 1:
        shown = ", ".join(folder if folder != "." else "(none)" for folder in distinct[:4])
        raise refused("images_invalid", f"Pictures lie at different depths, in {shown[:200]}.", hint=_LAY_OUT)
    if len(distinct) > _MAX_CLASSES:
        raise refused("images_invalid", f"There are more than {_MAX_CLASSES} folders.", hint=_LAY_OUT)
    names = tuple(PurePosixPath(folder).name for folder in distinct)
    if all(_NUMBER.fullmatch(name) for name in names) and len({int(name) for name in names}) == len(names):
        numbers = {folder: int(name) for folder, name in zip(distinct, names, strict=True)}
        return array.array("q", (numbers[folder] for folder in folders)), None
    places = {folder: place for place, folder in enumerate(distinct)}
    return array.array("q", (places[folder] for folder in folders)), names


def _drawn(names: list[str]) -> array.array[int]:
    """An order that has nothing to do with that of the names, and is the same for the same names."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    return array.array("q", sorted(range(len(names)), key=digests.__getitem__))
