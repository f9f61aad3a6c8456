"""Parameters of the pruning techniques."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from app.spec.base import Step
from app.spec.quantize import GlobPatterns


class PruneMagnitude(Step):
    """Set the smallest weights of linear layers to zero (Han et al. 2015). Needs no data.

    The file does not get smaller: zeros are stored. The report says so (`dense_zeros`).
    Useful before distillation, or `2:4` for hardware and runtimes that skip the pattern.
    """

    technique: Literal["prune.magnitude"] = "prune.magnitude"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of weights set to zero, over the layers pruned."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """`2:4`: two zeros in every four neighbouring inputs; the sparsity is then 0.5."""
    scope: Literal["layer", "global"] = "layer"
    """`layer`: every layer gets the same sparsity. `global`: one threshold for all."""
    ignore: GlobPatterns = ()
    """Layers left as they are: shell patterns on module names, e.g. `*.layers.0.*`."""

    @model_validator(mode="after")
    def _two_of_four_is_half(self) -> PruneMagnitude:
        if self.pattern == "2:4" and (self.sparsity != 0.5 or self.scope != "layer"):
            raise ValueError('pattern "2:4" fixes sparsity 0.5 and scope "layer": leave both out')
        return self


class PruneDepth(Step):
    """Remove whole blocks, those that change their input least (block influence, ShortGPT, Men et al. 2024).

    Leaves a smaller dense model that any loader reads by its config alone. Runs the model over calibration text.
    """

    needs_calibration: ClassVar[bool] = True

    technique: Literal["prune.depth"] = "prune.depth"
    drop_blocks: Annotated[int, Field(ge=1)] | None = None
    """How many blocks to remove. Give this or `drop_ratio`."""
    drop_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the blocks to remove, rounded to the nearest number of blocks, at least one. 0.2 if neither is given."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 4096
    """Tokens of calibration text to measure the influence of blocks on."""

    @model_validator(mode="after")
    def _one_amount(self) -> PruneDepth:
        if self.drop_blocks is not None and self.drop_ratio is not None:
            raise ValueError("give drop_blocks or drop_ratio, not both")
        return self

    def blocks_to_drop(self, num_blocks: int) -> int:
        """How many of `num_blocks` blocks this step removes."""
        if self.drop_blocks is not None:
            return self.drop_blocks
        ratio = 0.2 if self.drop_ratio is None else self.drop_ratio
        return max(1, round(ratio * num_blocks))
