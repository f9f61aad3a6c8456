"""From pixels to what a model is given, on NumPy alone: a process that runs an ONNX file must not hold PyTorch as well."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.spec.architectures import architecture_in
from app.spec.onnx_operators import ONNX_NETWORK
from app.spec.preprocessing import Preprocessing, parse_preprocessing
from workers.engine.images.image_set import Images


def preprocessing_of(directory: Path, *, channels: int | None = None) -> Preprocessing | None:
    """What a model's own files say becomes of an image; None for models of text.

    A graph without a config.json has images of so many `channels`.
    """
    if not (directory / "config.json").is_file():
        return _beside_a_graph(directory, channels)
    config = json.loads((directory / "config.json").read_text())
    architecture = architecture_in(config)
    if not architecture.takes_images:
        return None
    said = json.loads((directory / "preprocessor_config.json").read_text())
    return parse_preprocessing(said, model_type=architecture.model_type, channels=config["num_channels"])


def _beside_a_graph(directory: Path, channels: int | None) -> Preprocessing | None:
    file = directory / "preprocessor_config.json"
    if channels is None or not file.is_file():
        return None
    return parse_preprocessing(
        json.loads(file.read_text()), model_type=ONNX_NETWORK.model_type, channels=channels
    )


def pixel_values(images: Images, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """(pixel · scale − mean) / std, channel by channel: (images, channels, height, width), float32."""
    mean, std = (
        np.asarray(values, dtype=np.float32)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    values: NDArray[np.float32] = (images * np.float32(preprocessing.scale) - mean) / std
    return values
