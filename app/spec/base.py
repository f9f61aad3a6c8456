"""What all parts of a spec share."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import ConfigDict

from app.spec.documented import Documented

Format = Literal["safetensors", "compressed-tensors", "onnx", "gguf", "torch-dynamic-int8", "bitsandbytes"]


class Frozen(Documented):
    """An immutable value; a field it does not know is an error, so a typing mistake never passes in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Family(StrEnum):
    """What kind of model it is, which decides how its quality is measured."""

    CAUSAL_LM = "causal_lm"
    ENCODER = "encoder"
    IMAGE_CLASSIFIER = "image_classifier"


TEXT_FAMILIES = frozenset({Family.CAUSAL_LM, Family.ENCODER})
"""Models that read tokens."""


class Step(Frozen):
    """One step of a job. The class variables say what it needs and leaves behind."""

    families: ClassVar[frozenset[Family]] = TEXT_FAMILIES
    needs_calibration: ClassVar[bool] = False
    """Runs the model over the `calibration` text, or images."""
    needs_training: ClassVar[bool] = False
    """Trains on `training` text."""
    ends_early: ClassVar[bool] = False
    """Its training can be ended at the best state so far."""
    produces: ClassVar[Format] = "safetensors"
    """Only after a step that leaves plain safetensors can another step follow."""
    also_produces: ClassVar[frozenset[Format]] = frozenset()
    """What it writes instead where its parameters ask for that."""

    @property
    def output_format(self) -> Format:
        """What it writes with these parameters."""
        return self.produces
