"""What running images through a model takes, from the facts in its headers: an estimate, for its strides are not there."""

from __future__ import annotations

import math

from app.spec.facts import ModelFacts
from app.spec.onnx_operators import architecture_named

IMAGES_AT_ONCE = 8
"""Images that are evaluated together."""
_ACTIVATION_FLOATS_PER_PIXEL = 100
"""Of the widest layer: its inputs, its outputs and what lies between (MobileNetV2 and ResNet-50: 24 and 16 floats each)."""
_STREAMS = 2
"""A step runs every image as the original computes and with rounding, side by side."""
_PIXELS_PER_USE_OF_A_WEIGHT = 400
"""Each weight of a convolution is used at so many places less than there are pixels (ResNet-50: 300, MobileNetV2: 600)."""


def pixels(facts: ModelFacts) -> int:
    """Of one image as the model sees it, one channel counted. Raises ValueError for a model of text."""
    if facts.preprocessing is None:
        raise ValueError(f"{facts.architecture} takes no images")
    return math.prod(facts.preprocessing.size)


def image_bytes(facts: ModelFacts) -> int:
    """Bytes of one image, three channels of 8 bits."""
    return 3 * pixels(facts)


def image_activations(facts: ModelFacts, images: int) -> int:
    """Bytes of activations while so many images are run together."""
    return 4 * _ACTIVATION_FLOATS_PER_PIXEL * pixels(facts) * images


def calibration_activations(facts: ModelFacts, images: int) -> int:
    """The same while a step is calibrated on them."""
    return _STREAMS * image_activations(facts, images)


def image_flops(facts: ModelFacts, parameters: int) -> float:
    """Of one image: two for each weight and each place that uses it."""
    if architecture_named(facts.architecture).is_convolutional:
        return 2 * parameters * max(1.0, pixels(facts) / _PIXELS_PER_USE_OF_A_WEIGHT)
    return 2 * parameters * facts.max_positions
