"""What is known of a dataset of images without looking at a pixel."""

from __future__ import annotations

from typing import ClassVar, Literal

from app.spec.labels import LabelFacts

Layout = Literal["NHWC", "NCHW", "files"]
"""The order of images, height, width and channels; or picture files, which the job decodes."""

MAX_PICTURE_PIXELS = 2**25
"""Of a picture file: about 100 MB when it is decoded, and twice that while it is turned."""


class ImageSetFacts(LabelFacts):
    """The shape of a set of images of 8 bits a channel, and of its labels."""

    in_order: ClassVar[bool] = True

    images: int
    height: int
    """Of every image; of picture files the least."""
    width: int
    """Of every image; of picture files the least."""
    channels: int | None
    """Null for picture files, which are made to have those of the model."""
    layout: Layout
    """How the bytes lie in the file that is kept."""
