"""Images ready for a model, in a file of 8-bit pixels, from which several processes take the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from app.spec.image_costs import IMAGES_AT_ONCE
from workers.engine.images.image_set import Images


def save_images(path: Path, chunks: Iterable[Images], shape: tuple[int, int, int, int]) -> None:
    """Write images, some at a time, as one .npy of (images, channels, height, width)."""
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    at = 0
    for chunk in chunks:
        stored[at : at + len(chunk)] = chunk
        at += len(chunk)
    stored.flush()


class ImageBatches:
    """Batches of a file of images. Read, not mapped: mapped pages would count as the model's memory."""

    def __init__(self, path: Path) -> None:
        """Read the header alone."""
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self._path, self._offset = path, mapped.offset
        self._shape: tuple[int, ...] = mapped.shape

    def __len__(self) -> int:
        """How many batches; the last may be smaller."""
        return math.ceil(self._shape[0] / IMAGES_AT_ONCE)

    def __iter__(self) -> Iterator[Images]:
        """All of them, in order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Images:
        """One batch: (images, channels, height, width)."""
        first = index * IMAGES_AT_ONCE
        shape = (min(IMAGES_AT_ONCE, self._shape[0] - first), *self._shape[1:])
        start = self._offset + first * math.prod(self._shape[1:])
        return np.fromfile(self._path, dtype=np.uint8, count=math.prod(shape), offset=start).reshape(shape)
