"""torchvision's MobileNetV2 weights as a directory that transformers loads: the same network under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PREPROCESSOR = {
    "image_processor_type": "MobileNetV2ImageProcessor", "do_resize": True, "size": {"shortest_edge": 256},
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
_FIRST_BLOCK, _LAST = 2, 18
# Where a block's convolution and its norm stand in torchvision's Sequential; the last convolution has no activation.
_PARTS = (("expand_1x1", "0.0", "0.1"), ("conv_3x3", "1.0", "1.1"), ("reduce_1x1", "2", "3"))
_STEM = (
    ("first_conv", "0.0", "0.1"),
    ("conv_3x3", "1.conv.0.0", "1.conv.0.1"),
    ("reduce_1x1", "1.conv.1", "1.conv.2"),
)


def convert(weights: Path, directory: Path, **preprocessor: Any) -> Path:
    """Write config, weights and preprocessor; `preprocessor` overrides its keys. Raises KeyError for other weights."""
    import transformers

    source = load_file(weights)
    config = transformers.MobileNetV2Config(
        image_size=224, tf_padding=False, layer_norm_eps=1e-5, num_labels=len(source["classifier.1.bias"])
    )
    model = transformers.MobileNetV2ForImageClassification(config)
    model.load_state_dict(dict(_renamed(source)))
    model.save_pretrained(str(directory))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | preprocessor))
    return directory


def _renamed(source: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    found = [
        ("classifier.weight", source["classifier.1.weight"]),
        ("classifier.bias", source["classifier.1.bias"]),
    ]
    for name, convolution, norm in _STEM:
        found += _layer(source, f"conv_stem.{name}", f"features.{convolution}", f"features.{norm}")
    for number in range(_FIRST_BLOCK, _LAST):
        at = f"features.{number}.conv"
        for name, convolution, norm in _PARTS:
            layer = f"layer.{number - _FIRST_BLOCK}.{name}"
            found += _layer(source, layer, f"{at}.{convolution}", f"{at}.{norm}")
    return found + _layer(source, "conv_1x1", f"features.{_LAST}.0", f"features.{_LAST}.1")


def _layer(source: dict[str, Tensor], name: str, convolution: str, norm: str) -> list[tuple[str, Tensor]]:
    name = f"mobilenet_v2.{name}"
    counted = {"num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    parts = ("weight", "bias", "running_mean", "running_var")
    norms = counted | {part: source[f"{norm}.{part}"] for part in parts}
    return [
        (f"{name}.convolution.weight", source[f"{convolution}.weight"]),
        *((f"{name}.normalization.{part}", value) for part, value in norms.items()),
    ]
