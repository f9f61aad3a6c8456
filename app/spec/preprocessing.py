"""What becomes of an image before a model sees it, as `preprocessor_config.json` of transformers' image processors says.

Known are the processors of the architectures Modelpress knows: resize, crop to the centre, scale to 0 … 1, subtract a mean
and divide by a deviation. Whatever else a file asks for is refused, since left out it would change what the model sees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.spec.base import Frozen

Resampling = Literal["bilinear", "bicubic"]
Size = tuple[int, int]
"""Height and width."""

MAX_EDGE = 2048
MAX_CHANNELS = 64
_RESAMPLING: dict[int, Resampling] = {2: "bilinear", 3: "bicubic"}
_WARPED_FROM = 384
_TYPE = re.compile(r"(\w+?)(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?")
# What says nothing about the pixels, or says what is done anyway.
_NEUTRAL = frozenset({
    "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "_valid_processor_keys",
    "do_convert_rgb", "data_format", "input_data_format", "return_tensors", "default_to_square", "device",
    "disable_grouping", "do_reduce_labels", "pad_size", "image_seq_length",
})  # fmt: skip
_READ = frozenset({
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
})  # fmt: skip


class Preprocessing(Frozen):
    """Resize, crop, then `(pixel · scale − mean) / std` per channel; pixels are 0 to 255."""

    resize: Size | int | None
    """Height and width, or the length of the shorter edge, whose ratio is kept; null: as it comes."""
    resample: Resampling
    crop: Size | None
    """Height and width cut from the centre."""
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> Size:
        """Height and width of what the model sees. Raises ValueError where it depends on the image."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.resize, tuple):
            return self.resize
        raise ValueError(
            "images of different shapes would stay so: give size a height and a width, or a crop_size"
        )


@dataclass(frozen=True)
class _Defaults:
    """What a processor's class says where its file says nothing."""

    size: dict[str, int]
    resample: int = 2
    crop: dict[str, int] | None = None
    crop_share: float | None = None
    """ConvNeXt's: the shorter edge is made `size / share`, then `size` is cut from the centre."""


_SQUARE = {"height": 224, "width": 224}
_PROCESSORS = {
    "ViT": _Defaults(_SQUARE),
    "DeiT": _Defaults({"height": 256, "width": 256}, resample=3, crop=_SQUARE),
    "ConvNext": _Defaults({"shortest_edge": 384}, resample=3, crop_share=224 / 256),
    "MobileNetV1": _Defaults({"shortest_edge": 256}, crop=_SQUARE),
    "MobileNetV2": _Defaults({"shortest_edge": 256}, crop=_SQUARE),
}
_OF_MODEL = {
    "vit": "ViT", "deit": "DeiT", "resnet": "ConvNext", "mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2",
}  # fmt: skip


def parse_preprocessing(config: Mapping[str, Any], *, model_type: str, channels: int) -> Preprocessing:
    """Read a preprocessor_config.json. Raises ValueError with what is not understood, in words."""
    defaults = _defaults(config, model_type)
    unknown = sorted(key for key in config.keys() - _NEUTRAL - _READ if config[key] not in (None, False))
    if unknown:
        raise ValueError(f"{', '.join(unknown[:5])} would change what the model sees, and is not known")
    resize, crop = _geometry(config, defaults)
    found = Preprocessing(
        resize=resize,
        resample=_resampling(config.get("resample", defaults.resample)),
        crop=crop,
        scale=_number(config, "rescale_factor", 1 / 255) if _is_on(config, "do_rescale") else 1.0,
        mean=_per_channel(config, "image_mean", channels, neutral=0.0),
        std=_per_channel(config, "image_std", channels, neutral=1.0),
    )
    if min(found.std) <= 0:
        raise ValueError("image_std must be above 0")
    _check_crop(found)
    return found


def _defaults(config: Mapping[str, Any], model_type: str) -> _Defaults:
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    if named is None:
        return _PROCESSORS[_OF_MODEL[model_type]]
    match = _TYPE.fullmatch(named) if isinstance(named, str) else None
    if match is None or match[1] not in _PROCESSORS:
        known = ", ".join(f"{name}ImageProcessor" for name in _PROCESSORS)
        raise ValueError(f"the processor {str(named)[:50]!r} is not known; {known} are")
    return _PROCESSORS[match[1]]


def _geometry(config: Mapping[str, Any], defaults: _Defaults) -> tuple[Size | int | None, Size | None]:
    crop = None
    if _is_on(config, "do_center_crop", default=defaults.crop is not None):
        crop = _height_and_width(config.get("crop_size") or defaults.crop, "crop_size")
    if not _is_on(config, "do_resize"):
        return None, crop
    size = config.get("size") or defaults.size
    if defaults.crop_share is not None:
        return _convnext(config, size, defaults.crop_share)
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return _edge(size["shortest_edge"], "size"), crop
    # The processors that keep the ratio take a bare number for the shorter edge.
    if isinstance(size, int) and "shortest_edge" in defaults.size:
        return _edge(size, "size"), crop
    return _height_and_width(size, "size"), crop


def _convnext(config: Mapping[str, Any], size: Any, share: float) -> tuple[Size | int, Size | None]:
    edge = _edge(size.get("shortest_edge") if isinstance(size, Mapping) else size, "size.shortest_edge")
    if edge >= _WARPED_FROM:
        return (edge, edge), None
    share = _number(config, "crop_pct", share)
    if not edge / MAX_EDGE <= share <= 1:
        raise ValueError(f"crop_pct must be at most 1, and large enough for an edge of {MAX_EDGE} pixels")
    return _edge(int(edge / share), "size / crop_pct"), (edge, edge)


def _check_crop(found: Preprocessing) -> None:
    if found.crop is None or found.resize is None:
        return
    height, width = found.resize if isinstance(found.resize, tuple) else (found.resize, found.resize)
    if found.crop[0] > height or found.crop[1] > width:
        raise ValueError("crop_size is larger than size: the border would be black")


def _height_and_width(value: Any, name: str) -> Size:
    if isinstance(value, int):
        value = {"height": value, "width": value}
    if not isinstance(value, Mapping) or set(value) != {"height", "width"}:
        raise ValueError(f"{name} must be a number, or height and width, and is {str(value)[:80]}")
    return _edge(value["height"], name), _edge(value["width"], name)


def _edge(value: Any, name: str) -> int:
    if type(value) is not int or not 0 < value <= MAX_EDGE:
        raise ValueError(f"{name} must be 1 to {MAX_EDGE} pixels, and is {str(value)[:50]}")
    return value


def _resampling(value: Any) -> Resampling:
    if type(value) is not int or value not in _RESAMPLING:
        raise ValueError(f"resample {str(value)[:50]} is not known; 2 (bilinear) and 3 (bicubic) are")
    return _RESAMPLING[value]


def _per_channel(config: Mapping[str, Any], key: str, channels: int, *, neutral: float) -> tuple[float, ...]:
    if not _is_on(config, "do_normalize"):
        return (neutral,) * channels
    # The default of every known processor is 0.5, for mean and deviation alike.
    value = config.get(key, 0.5)
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels or not all(_is_finite(number) for number in values):
        raise ValueError(
            f"{key} must be a number for each of the {channels} channels, and is {str(value)[:80]}"
        )
    return tuple(float(number) for number in values)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not _is_finite(value):
        raise ValueError(f"{key} must be a number, and is {str(value)[:50]}")
    return float(value)


def _is_on(config: Mapping[str, Any], key: str, *, default: bool = True) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, and is {str(value)[:50]}")
    return default if value is None else value


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
