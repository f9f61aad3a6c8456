"""What is known of a dataset of images without looking at a pixel."""

from __future__ import annotations

from typing import Literal

from app.spec.labels import LabelFacts

Layout = Literal["NHWC", "NCHW"]
"""The order of images, height, width and channels."""


class ImageSetFacts(LabelFacts):
    """The shape of a set of images of 8 bits a channel, and of its labels."""

    images: int
    height: int
    width: int
    channels: int
    layout: Layout
    """How the bytes lie in the file that is kept."""
