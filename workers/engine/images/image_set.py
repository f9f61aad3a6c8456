"""A dataset of images as the service keeps it: a safetensors file of `images`, uint8, or of picture files, and of `labels`.

See app.intake.read_images and app.intake.read_pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.spec.facts import ModelFacts
from workers.engine.labels import numbered

_AT_ONCE = 64

Images = NDArray[np.uint8]
"""(images, channels, height, width)"""


@dataclass(frozen=True)
class ImageSet:
    """The images of a dataset, read some at a time, in an order drawn once: files go class by class, and a job may take the first few."""

    path: Path

    @property
    def count(self) -> int:
        """How many there are."""
        with self._open() as file:
            return int(file.get_slice("ends" if _are_files(file) else "images").get_shape()[0])

    @property
    def are_files(self) -> bool:
        """Whether they are picture files, of any size, which must be decoded."""
        with self._open() as file:
            return _are_files(file)

    @property
    def order(self) -> NDArray[np.int64]:
        """The order that images are read in, and their labels: the same for the same set."""
        with self._open() as file:
            return _order(file)

    def chunks(self, count: int) -> Iterator[Images]:
        """The first `count` images, some at a time. Of a set that is no picture files."""
        with self._open() as file:
            stored, layout = file.get_slice("images"), file.metadata()["layout"]
            chosen = _order(file)[:count].tolist()
            for start in range(0, len(chosen), _AT_ONCE):
                images = np.concatenate([stored[at : at + 1] for at in chosen[start : start + _AT_ONCE]])
                yield images.transpose(0, 3, 1, 2) if layout == "NHWC" else images

    def files(self, count: int) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of the first `count` picture files, in the order they are read in."""
        with self._open() as file:
            ends, order = file.get_tensor("ends"), _order(file)
            names = str(file.get_tensor("names").tobytes(), "utf-8").split("\n")
            pictures = file.get_slice("pictures")
            for number in order[:count].tolist():
                start = int(ends[number - 1]) if number else 0
                yield names[number], pictures[start : int(ends[number])].tobytes()

    def labels(self, count: int, facts: ModelFacts | None = None) -> NDArray[np.int64] | None:
        """The classes of the first `count` images, as the model numbers them: (images,); None for a set without.

        `facts` are the model's, and needed only where labels have names. Raises InvalidRequest (`labels_do_not_fit`) where the model knows no class of a label's name.
        """
        with self._open() as file:
            if "labels" not in file.keys():  # noqa: SIM118 - it is no dict
                return None
            labels: NDArray[np.int64] = file.get_tensor("labels")[_order(file)]
            names = file.metadata().get("label_names")
        return numbered(labels[:count], names, facts, in_order=True)

    def fingerprints(self, count: int) -> list[bytes]:
        """A digest of each of the first `count` images: the same for the same pixels, or the same files."""
        if self.are_files:
            return [hashlib.sha256(content).digest() for _, content in self.files(count)]
        return [
            hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
            for chunk in self.chunks(count)
            for image in chunk
        ]

    def digest(self) -> str:
        """The sha256 of the file, in hex: what a report quotes to say which images were used."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _open(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="np")


def _are_files(file: Any) -> bool:
    return bool(file.metadata()["layout"] == "files")


def _order(file: Any) -> NDArray[np.int64]:
    if _are_files(file):
        order: NDArray[np.int64] = file.get_tensor("order")
        return order
    return np.random.default_rng(0).permutation(file.get_slice("images").get_shape()[0])
