"""Tiny random image classifiers, with a preprocessor_config.json, and sets of images that they tell apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SIDE = 32
LABELS = 5
_TRANSFORMER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": 8, "initializer_range": 0.1,
}  # fmt: skip
_MOBILE = {"depth_multiplier": 0.25, "image_size": SIDE}
_CONFIGS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": _TRANSFORMER,
    "DeiTForImageClassification": _TRANSFORMER,
    "ResNetForImageClassification": {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck",
    },
    "MobileNetV1ForImageClassification": _MOBILE,
    "MobileNetV2ForImageClassification": _MOBILE | {"finegrained_output": False},
}  # fmt: skip
_PROCESSOR = {
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.45, 0.4], "image_std": [0.2, 0.25, 0.3],
    "image_processor_type": "ViTImageProcessor",
}  # fmt: skip


def tiny_image_model(architecture: str, directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write config, safetensors and preprocessor of a random model; `config` overrides keys of its configuration.

    Batch norms have statistics of real passes, and random scales, so that folding one wrongly is caught.
    """
    import transformers

    model_class = getattr(transformers, architecture)
    settings = _CONFIGS[architecture] | {"num_labels": LABELS} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            _settle_norms(model)
    model.save_pretrained(str(directory))
    (directory / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    return directory


def write_images(
    path: Path, *, images: int = 24, labels: bool = True, side: int = SIDE, seed: int = 0
) -> Path:
    """Write an image dataset as the service keeps it: coarse random patterns, (images, side, side, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (images, 3, 4, 4), generator=generator).float()
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    tensors: dict[str, Tensor] = {"images": smooth.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()}
    if labels:
        tensors["labels"] = torch.randint(0, LABELS, (images,), generator=generator)
    save_file(tensors, path, metadata={"layout": "NHWC"})
    return path


def _settle_norms(model: nn.Module) -> None:
    """Let batch norms see what they will normalize, or twenty layers of noise fade to nothing."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train(mode=bool(norms))
    for _ in range(2 if norms else 0):
        model(pixel_values=torch.randn(16, 3, SIDE, SIDE))
    model.eval()
