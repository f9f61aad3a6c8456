"""The images that a step is calibrated on, as the model is given them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from app.spec.report import Flag
from workers.engine.images.fitting import fitted_images
from workers.engine.images.image_set import ImageSet
from workers.engine.images.pixels import pixel_values
from workers.engine.technique import StepContext


def calibration_pixels(context: StepContext, count: int) -> NDArray[np.float32]:
    """The first images of the step's set: (images, channels, height, width), float32, preprocessed."""
    preprocessing = context.facts.preprocessing
    if context.calibration_images is None or preprocessing is None:
        raise ValueError("the step needs calibration images")
    chunks = fitted_images(ImageSet(context.calibration_images), count, preprocessing)
    return np.concatenate([pixel_values(chunk, preprocessing) for chunk in chunks])


def calibration_image_flags(images: int, *, wanted: int) -> Iterator[Flag]:
    """What a reader must know of the images that a step was calibrated on."""
    if images < wanted:
        yield Flag(
            code="calibration_short",
            detail=f"The calibration set has {images} images; the step asked for {wanted}. With fewer, what it learns of the "
            "inputs is less sure: give it more.",
        )
