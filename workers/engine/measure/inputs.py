"""What both models are run on, from the file it was laid down in: windows of tokens, or batches of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray


class Inputs(Protocol):
    """Windows or batches, in order."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[NDArray[Any]]: ...
    def __getitem__(self, index: int, /) -> NDArray[Any]: ...


def load_inputs(path: Path) -> Inputs:
    """Windows of a .npz (see windows.py), or batches of the images in a .npy (see images/batches.py)."""
    if path.suffix == ".npy":
        from workers.engine.images.batches import ImageBatches

        return ImageBatches(path)
    from workers.engine.measure.windows import load_windows

    return load_windows(path)
