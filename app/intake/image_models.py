"""What is special about the facts of an image classifier: its preprocessing, and the shapes that must agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.intake.config_values import config_integer
from app.intake.names import CONFIG, PREPROCESSOR
from app.intake.refusals import refused
from app.intake.shapes import check_blocks
from app.spec.architectures import Architecture
from app.spec.facts import ModelFacts, TensorFact
from app.spec.preprocessing import MAX_CHANNELS, parse_preprocessing

_POSITIONS = "embeddings.position_embeddings"
_HEADS = ("classifier.weight", "classifier.1.weight")


def image_values(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    architecture: Architecture,
    tensors: tuple[TensorFact, ...],
) -> dict[str, Any]:
    """Sizes and preprocessing, by the names of the facts. Raises IntakeError."""
    channels = config_integer(config, "num_channels", at_most=MAX_CHANNELS)
    try:
        preprocessing = parse_preprocessing(
            preprocessor, model_type=architecture.model_type, channels=channels
        )
        height, width = preprocessing.size
    except ValueError as error:
        raise refused("preprocessing_unknown", f"{PREPROCESSOR}: {error}.") from None
    values: dict[str, Any] = {"vocab_size": 0, "preprocessing": preprocessing}
    if architecture.is_convolutional:
        features = next(t.shape[1] for t in tensors if t.name in _HEADS and len(t.shape) == 2)
        return values | {"num_blocks": 0, "max_positions": 0, "hidden_size": features}
    _check_image_size(config, height, width)
    return values | {
        "num_blocks": config_integer(config, architecture.blocks_key),
        "hidden_size": config_integer(config, architecture.hidden_key),
        "max_positions": _positions(tensors),
    }


def check_image_shapes(facts: ModelFacts, config: Mapping[str, Any]) -> None:
    """Raise IntakeError unless blocks, channels and labels are those of the tensors."""
    if facts.num_blocks:
        check_blocks(facts, CONFIG)
    first = next(
        (t for t in facts.tensors if len(t.shape) == 4 and t.shape[1] == config["num_channels"]), None
    )
    if first is None:
        raise refused(
            "config_mismatch",
            f"{CONFIG} says num_channels {config['num_channels']}, and no convolution takes so many.",
        )
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and len(labels) != facts.num_labels:
        raise refused(
            "config_mismatch",
            f"{CONFIG} names {len(labels)} labels, and the classifier has {facts.num_labels} outputs.",
        )


def _check_image_size(config: Mapping[str, Any], height: int, width: int) -> None:
    size = config.get("image_size")
    expected = tuple(size) if isinstance(size, list) else (size, size)
    if expected != (height, width):
        raise refused(
            "config_mismatch",
            f"{CONFIG} says image_size {str(size)[:50]}, and {PREPROCESSOR} makes images of {height} by {width}.",
        )


def _positions(tensors: tuple[TensorFact, ...]) -> int:
    table = next((t for t in tensors if t.name.endswith(_POSITIONS) and len(t.shape) == 3), None)
    if table is None:
        raise refused("tensor_missing", f"{CONFIG} has no {_POSITIONS}.")
    return table.shape[1]
