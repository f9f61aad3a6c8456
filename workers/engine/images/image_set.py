"""A dataset of images as the service keeps it: a safetensors file of `images`, uint8, and perhaps `labels`, int64."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 64

Images = NDArray[np.uint8]
"""(images, channels, height, width)"""


@dataclass(frozen=True)
class ImageSet:
    """The images of a dataset, read some at a time."""

    path: Path

    @property
    def count(self) -> int:
        """How many there are."""
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as file:
            return int(file.get_slice("images").get_shape()[0])

    def chunks(self, count: int) -> Iterator[Images]:
        """The first `count` images, some at a time."""
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as file:
            stored, layout = file.get_slice("images"), file.metadata()["layout"]
            end = min(count, stored.get_shape()[0])
            for start in range(0, end, _AT_ONCE):
                images = stored[start : min(end, start + _AT_ONCE)]
                yield images.transpose(0, 3, 1, 2) if layout == "NHWC" else images

    def labels(self, count: int) -> NDArray[np.int64] | None:
        """Those of the first `count` images: (images,); None for a set without."""
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as file:
            if "labels" not in file.keys():  # noqa: SIM118 - it is no dict
                return None
            labels: NDArray[np.int64] = file.get_tensor("labels")[:count]
            return labels

    def fingerprints(self, count: int) -> list[bytes]:
        """A digest of each of the first `count` images: the same for the same pixels."""
        return [
            hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
            for chunk in self.chunks(count)
            for image in chunk
        ]

    def digest(self) -> str:
        """The sha256 of the file, in hex: what a report quotes to say which images were used."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
