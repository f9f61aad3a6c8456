"""What a dataset that came in is: text, or images. Its bytes decide; its name only tells kinds of text apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.intake.read_images import ImageFormat, read_images
from app.intake.read_labelled_text import has_labels, read_labelled_text
from app.intake.read_pictures import PicturesFormat, read_pictures
from app.intake.read_text import TextFormat, text_chunks, text_format
from app.intake.sniff import Kind, sniff
from app.intake.zip_reader import zip_names
from app.spec.image_set import ImageSetFacts
from app.spec.text_set import TextSetFacts

_ARCHIVES: dict[Kind, PicturesFormat] = {"zip": "zip", "tar": "tar", "tar.gz": "tar.gz"}


@dataclass(frozen=True)
class ReadDataset:
    """A dataset that was accepted as far as its headers go, or read to its end where it has labels."""

    format: TextFormat | ImageFormat | PicturesFormat
    chunks: Iterator[bytes]
    """The form that is kept, piece by piece. Raises IntakeError where the file turns out to be damaged."""
    images: ImageSetFacts | None = None
    """None for text."""
    texts: TextSetFacts | None = None
    """Of texts with labels."""


def read_dataset(path: Path, name: str, *, max_bytes: int) -> ReadDataset:
    """Read a dataset; at most `max_bytes` come out of an archive. Raises IntakeError."""
    kind = sniff(path)
    form = _arrays(path, kind)
    if form is not None:
        found = read_images(path, name, form, max_bytes=max_bytes)
        return ReadDataset(form, found.chunks(), images=found.facts)
    if kind in _ARCHIVES:
        pictures = read_pictures(path, _ARCHIVES[kind], max_bytes=max_bytes)
        return ReadDataset(_ARCHIVES[kind], pictures.chunks(), images=pictures.facts)
    text = text_format(path, name)
    if text == "jsonl" and has_labels(path, name):
        labelled = read_labelled_text(path, name)
        return ReadDataset(text, labelled.chunks(), texts=labelled.facts)
    return ReadDataset(text, text_chunks(path, name, text))


def _arrays(path: Path, kind: Kind) -> ImageFormat | None:
    """A zip is of arrays where it has one; otherwise it is of pictures."""
    if kind == "zip":
        return "npz" if any(name.endswith(".npy") for name in zip_names(path)) else None
    return "safetensors" if kind == "safetensors" else None
