"""Values of a config.json, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.intake.refusals import refused


def config_integer(config: Mapping[str, Any], key: str, *, at_most: int = 2**31 - 1) -> int:
    """A number above 0. Raises IntakeError."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= at_most:
        raise refused("config_invalid", f"config.json has no usable {key}: {str(value)[:50]!r}.")
    return value
