"""Facts of image classifiers, and uploads of them that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_files import safetensors, safetensors_header

from app.errors import IntakeError
from app.intake.read_model import read_model
from app.spec.base import Family
from app.spec.facts import ModelFacts

Shapes = dict[str, tuple[int, ...]]

LABELS = {"0": "cat", "1": "dog", "2": "cow"}
PROCESSOR = {"size": 32, "image_processor_type": "ViTImageProcessor"}
VIT = {
    "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1,
    "image_size": 32, "patch_size": 16, "num_channels": 3, "id2label": LABELS,
}  # fmt: skip
VIT_SHAPES: Shapes = {
    "vit.embeddings.cls_token": (1, 1, 16), "vit.embeddings.position_embeddings": (1, 5, 16),
    "vit.embeddings.patch_embeddings.projection.weight": (16, 3, 16, 16),
    "vit.encoder.layer.0.attention.attention.query.weight": (16, 16), "classifier.weight": (3, 16),
}  # fmt: skip
RESNET = {
    "architectures": ["ResNetForImageClassification"], "model_type": "resnet", "num_channels": 3, "depths": [1],
    "hidden_sizes": [8], "id2label": LABELS,
}  # fmt: skip
RESNET_SHAPES: Shapes = {
    "resnet.embedder.embedder.convolution.weight": (4, 3, 7, 7),
    "resnet.embedder.embedder.normalization.weight": (4,),
    "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight": (8, 4, 3, 3), "classifier.1.weight": (3, 8),
}  # fmt: skip


def read(
    directory: Path, config: dict[str, Any], shapes: Shapes, processor: dict[str, Any] | None = PROCESSOR
) -> ModelFacts:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(safetensors(safetensors_header(shapes)))
    if processor is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return read_model({path.name: path for path in directory.iterdir()}).facts


def test_a_vision_transformer_needs_no_tokenizer(tmp_path: Path) -> None:
    facts = read(tmp_path, VIT, VIT_SHAPES)
    assert facts.family is Family.IMAGE_CLASSIFIER
    assert (facts.num_blocks, facts.hidden_size, facts.max_positions, facts.num_labels) == (1, 16, 5, 3)
    assert facts.preprocessing is not None
    assert facts.preprocessing.size == (32, 32)
    assert len(facts.compressible()) == 3


def test_every_convolution_of_a_network_without_blocks_can_be_worked_on(tmp_path: Path) -> None:
    facts = read(tmp_path, RESNET, RESNET_SHAPES)
    assert (facts.num_blocks, facts.hidden_size, facts.max_positions, facts.num_labels) == (0, 8, 0, 3)
    assert {t.name for t in facts.compressible()} == RESNET_SHAPES.keys() - {
        "resnet.embedder.embedder.normalization.weight"
    }


@pytest.mark.parametrize(
    ("config", "shapes", "processor", "code"),
    [
        (VIT, VIT_SHAPES, None, "preprocessor_missing"),
        (VIT, VIT_SHAPES, PROCESSOR | {"do_pad": True}, "preprocessing_unknown"),
        (VIT, VIT_SHAPES, PROCESSOR | {"auto_map": {"AutoImageProcessor": "code.Mine"}}, "remote_code"),
        (VIT, VIT_SHAPES, PROCESSOR | {"size": 64}, "config_mismatch"),
        (VIT | {"num_hidden_layers": 2}, VIT_SHAPES, PROCESSOR, "config_mismatch"),
        (VIT | {"num_channels": 1}, VIT_SHAPES, PROCESSOR, "config_mismatch"),
        (VIT | {"num_channels": "3"}, VIT_SHAPES, PROCESSOR, "config_invalid"),
        (RESNET | {"id2label": {"0": "cat"}}, RESNET_SHAPES, PROCESSOR, "config_mismatch"),
        (
            RESNET,
            {n: s for n, s in RESNET_SHAPES.items() if "classifier" not in n},
            PROCESSOR,
            "tensor_missing",
        ),
        (VIT, {n: s for n, s in VIT_SHAPES.items() if "position" not in n}, PROCESSOR, "tensor_missing"),
        (RESNET, RESNET_SHAPES, {"size": 10**9, "crop_pct": 1e-300}, "preprocessing_unknown"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, config: dict[str, Any], shapes: Shapes, processor: dict[str, Any] | None, code: str
) -> None:
    with pytest.raises(IntakeError) as refused:
        read(tmp_path, config, shapes, processor)
    assert refused.value.code == code
    assert refused.value.hint
