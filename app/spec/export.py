"""What is written in the end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.spec.base import Frozen


class Export(Frozen):
    """The form of the result."""

    format: Literal["auto", "safetensors", "compressed-tensors", "onnx"] = "auto"
    """`auto`: what the last step writes. Anything else must be what the last step writes, or the job is refused."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    """Weight files are split at this size."""
