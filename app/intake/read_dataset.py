"""What a dataset that came in is: text, or images. Its bytes decide; its name only tells kinds of text apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.intake.read_images import ImageFormat, read_images
from app.intake.read_text import TextFormat, text_chunks, text_format
from app.intake.sniff import Kind, sniff
from app.spec.image_set import ImageSetFacts

_IMAGES: dict[Kind, ImageFormat] = {"zip": "npz", "safetensors": "safetensors"}


@dataclass(frozen=True)
class ReadDataset:
    """A dataset that was accepted as far as its headers go."""

    format: TextFormat | ImageFormat
    images: ImageSetFacts | None
    """None for text."""
    chunks: Iterator[bytes]
    """The form that is kept, piece by piece. Raises IntakeError where the file turns out to be damaged."""


def read_dataset(path: Path, name: str, *, max_bytes: int) -> ReadDataset:
    """Read a dataset; at most `max_bytes` come out of an archive. Raises IntakeError."""
    form = _IMAGES.get(sniff(path))
    if form is not None:
        found = read_images(path, name, form, max_bytes=max_bytes)
        return ReadDataset(form, found.facts, found.chunks())
    text = text_format(path, name)
    return ReadDataset(text, None, text_chunks(path, name, text))
