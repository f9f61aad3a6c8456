"""Values of a config.json, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from app.intake.refusals import refused

_MAX_LABEL_CHARACTERS = 200


def config_integer(config: Mapping[str, Any], key: str, *, at_most: int = 2**31 - 1) -> int:
    """A number above 0. Raises IntakeError."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= at_most:
        raise refused("config_invalid", f"config.json has no usable {key}: {str(value)[:50]!r}.")
    return value


def config_labels(config: Mapping[str, Any], count: int | None) -> tuple[str, ...] | None:
    """What id2label calls each of `count` classes, in order; None where it does not name them all."""
    names = config.get("id2label")
    if count is None or not isinstance(names, Mapping):
        return None
    found = [names.get(str(number)) for number in range(count)]
    usable = [name for name in found if isinstance(name, str) and len(name) <= _MAX_LABEL_CHARACTERS]
    return tuple(usable) if len(usable) == count else None


def config_problem(config: Mapping[str, Any]) -> Literal["multi_label_classification", "regression"] | None:
    """What a classifier's outputs are, where it says that they are no distribution over classes. Raises IntakeError."""
    match config.get("problem_type"):
        case "multi_label_classification":
            return "multi_label_classification"
        case "regression":
            return "regression"
        case None | "single_label_classification":
            return None
        case unknown:
            raise refused("config_invalid", f"config.json has a problem_type of {str(unknown)[:50]!r}.")
