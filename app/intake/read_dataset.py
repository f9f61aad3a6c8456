"""What a dataset that came in is: text, or images. Its bytes decide; its name only tells kinds of text apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.intake.read_images import ImageFormat, read_images
from app.intake.read_labelled_text import has_labels, read_labelled_text
from app.intake.read_text import TextFormat, text_chunks, text_format
from app.intake.sniff import Kind, sniff
from app.spec.image_set import ImageSetFacts
from app.spec.text_set import TextSetFacts

_IMAGES: dict[Kind, ImageFormat] = {"zip": "npz", "safetensors": "safetensors"}


@dataclass(frozen=True)
class ReadDataset:
    """A dataset that was accepted as far as its headers go, or read to its end where it has labels."""

    format: TextFormat | ImageFormat
    chunks: Iterator[bytes]
    """The form that is kept, piece by piece. Raises IntakeError where the file turns out to be damaged."""
    images: ImageSetFacts | None = None
    """None for text."""
    texts: TextSetFacts | None = None
    """Of texts with labels."""


def read_dataset(path: Path, name: str, *, max_bytes: int) -> ReadDataset:
    """Read a dataset; at most `max_bytes` come out of an archive. Raises IntakeError."""
    form = _IMAGES.get(sniff(path))
    if form is not None:
        found = read_images(path, name, form, max_bytes=max_bytes)
        return ReadDataset(form, found.chunks(), images=found.facts)
    text = text_format(path, name)
    if text == "jsonl" and has_labels(path, name):
        labelled = read_labelled_text(path, name)
        return ReadDataset(text, labelled.chunks(), texts=labelled.facts)
    return ReadDataset(text, text_chunks(path, name, text))
