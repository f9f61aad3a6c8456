"""Resize and crop images as transformers' image processors do: antialiased, back to 8 bits, then cut from the centre."""

from __future__ import annotations

import torch
from torch.nn import functional

from app.spec.preprocessing import Preprocessing, Size
from workers.engine.images.image_set import Images


def fitted(images: Images, preprocessing: Preprocessing) -> Images:
    """Images of the size the model takes: (images, channels, height, width), uint8; those that have it stay as they are."""
    height, width = images.shape[2:]
    wanted = resized_size((height, width), preprocessing.resize)
    if wanted != (height, width):
        pixels = functional.interpolate(
            torch.from_numpy(images.copy()).float(),
            size=wanted,
            mode=preprocessing.resample,
            antialias=True,
            align_corners=False,
        )
        # Bicubic interpolation overshoots.
        images = pixels.round().clamp(0, 255).to(torch.uint8).numpy()
    return images if preprocessing.crop is None else cut(images, preprocessing.crop)


def resized_size(size: Size, resize: Size | int | None) -> Size:
    """Height and width that an image of this size is brought to, before it is cut."""
    if resize is None:
        return size
    if isinstance(resize, tuple):
        return resize
    height, width = size
    short = min(height, width)
    return int(resize * height / short), int(resize * width / short)


def cut(images: Images, crop: Size) -> Images:
    """The centre of images: (…, height, width)."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], crop, strict=True))
    return images[..., top : top + crop[0], left : left + crop[1]]
