"""What preprocessor_config.json files of real models say, and what of them is refused."""

from __future__ import annotations

from typing import Any

import pytest

from app.spec.preprocessing import parse_preprocessing

RESNET_50 = {
    "crop_pct": 0.875, "do_normalize": True, "do_resize": True, "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
}  # fmt: skip
VIT_BASE = {
    "do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2,
    "size": 224,
}  # fmt: skip
MOBILENET_V2 = {
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "MobileNetV2ImageProcessor",
    "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256},
}  # fmt: skip
DEIT = {
    "crop_size": 224, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3, "size": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "model_type", "resize", "crop", "resample"),
    [
        (RESNET_50, "resnet", 256, (224, 224), "bicubic"),
        (VIT_BASE, "vit", (224, 224), None, "bilinear"),
        (MOBILENET_V2, "mobilenet_v2", 256, (224, 224), "bilinear"),
        (DEIT, "deit", (256, 256), (224, 224), "bicubic"),
        ({"size": {"shortest_edge": 384}}, "resnet", (384, 384), None, "bicubic"),
        ({"do_resize": False}, "mobilenet_v1", None, (224, 224), "bilinear"),
    ],
)
def test_geometry_is_what_the_processor_of_transformers_does(
    config: dict[str, Any], model_type: str, resize: Any, crop: Any, resample: str
) -> None:
    found = parse_preprocessing(config, model_type=model_type, channels=3)
    assert (found.resize, found.crop, found.resample) == (resize, crop, resample)
    assert found.size == (crop or resize)


def test_pixels_are_scaled_as_the_file_says() -> None:
    found = parse_preprocessing(RESNET_50, model_type="resnet", channels=3)
    assert (found.scale, found.mean, found.std) == (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    bare = parse_preprocessing(
        VIT_BASE | {"do_rescale": False, "do_normalize": False}, model_type="vit", channels=1
    )
    assert (bare.scale, bare.mean, bare.std) == (1.0, (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"image_processor_type": 7}, "not known"),
        ({"resample": 1}, "resample 1"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"size": 10**6}, "2048"),
        ({"size": {"height": True, "width": 3}}, "1 to 2048"),
        ({"image_std": [0.5, 0.5]}, "image_std"),
        ({"image_std": [0.5, 0.5, 0.0]}, "above 0"),
        ({"image_mean": [0.5, 0.5, "x"]}, "image_mean"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"do_center_crop": True, "crop_size": 256}, "larger than size"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_preprocessing(VIT_BASE | change, model_type="vit", channels=3)


def test_images_of_any_shape_have_no_one_size() -> None:
    found = parse_preprocessing(
        {"do_center_crop": False, "size": {"shortest_edge": 256}}, model_type="mobilenet_v2", channels=3
    )
    with pytest.raises(ValueError, match="crop_size"):
        _ = found.size
