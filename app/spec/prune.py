"""Parameters of the pruning techniques."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from app.spec.architectures import Architecture
from app.spec.base import Step
from app.spec.feed_forward import can_fill_gaps
from app.spec.quantize import GlobPatterns

SENSITIVITY_SPARSITIES = (0.3, 0.5, 0.7, 0.85)
"""At which it is found out what a layer's sparsity costs."""


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


class PruneCalibrated(Step):
    """Set those weights to zero that the outputs miss least on calibration text, and let the others make up for them.

    Runs the model over the text block by block, with one block in memory; each block is calibrated on what the pruned
    blocks before it give. The file does not get smaller: zeros are stored, and the report says so (`dense_zeros`).
    """

    needs_calibration: ClassVar[bool] = True

    technique: Literal["prune.calibrated"] = "prune.calibrated"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of weights set to zero, over the layers pruned."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """`2:4`: two zeros in every four neighbouring inputs, which GPUs from Ampere on can skip; `4:8`: four in every eight.
    The sparsity is then 0.5."""
    criterion: Literal["sparsegpt", "wanda", "taylor", "gradient", "magnitude", "random"] = "sparsegpt"
    """Which weights go. `sparsegpt`: those whose loss can be made up for best (Frantar & Alistarh 2023). `wanda`: small ones
    with small inputs (Sun et al. 2023). `taylor`: those whose absence moves the model's own loss least, to first order
    (Molchanov et al. 2019). `gradient`: those that this loss depends on least, whatever their size. These two take about
    three times as long. `magnitude`: small ones. `random`: any; the baseline to compare with."""
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    """How the sparsity is shared out. `uniform`: every layer gets the same. `sensitivity`: those that the model's loss depends
    on less get more, at most 0.2 away from it, by a curve of each layer that stands in the report; takes about five times
    as long."""
    compensate: bool = True
    """Move the weights that stay, so that outputs change least. False: they stay as they are unless `refinements` is given,
    and an equal share of each output's weights goes; with `wanda`, the method of its paper."""
    refinements: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Steps of fitting the weights that stay all together (conjugate gradients). Null: 6 with `compensate`, else 0. More
    come closer on the calibration text, and with few tokens no closer elsewhere."""
    ignore: GlobPatterns = ()
    """Layers left as they are: shell patterns on module names, e.g. `*.layers.0.*`."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text the layers' inputs are gathered from; the time grows with it."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    """Tokens of one window of calibration text; cut to what the model can take."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Added to the diagonal of each layer's input statistics, as a share of its mean; more helps where tokens are few."""

    @model_validator(mode="after")
    def _patterns_are_half(self) -> PruneCalibrated:
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise ValueError(f'pattern "{self.pattern}" fixes sparsity 0.5: leave it out')
        if self.pattern != "unstructured" and self.allocation != "uniform":
            raise ValueError(
                f'pattern "{self.pattern}" fixes the sparsity of every layer: leave allocation out'
            )
        return self

    @property
    def uses_gradients(self) -> bool:
        """Whether weights are chosen by gradients."""
        return self.criterion in ("taylor", "gradient")

    @property
    def runs_backwards(self) -> bool:
        """Whether the model is run backwards first."""
        return self.uses_gradients or self.allocation == "sensitivity"

    @property
    def fitting_steps(self) -> int:
        """`refinements`, made definite."""
        if self.refinements is not None:
            return self.refinements
        return 6 if self.compensate else 0


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
    """Tokens of calibration text to measure the influence of blocks on, and to repair what is left: better 16,384."""
    repair: bool | None = None
    """Refit the last layer before each gap by least squares, so that what follows meets nearly what it always met. Null: where
    that layer adds to what leaves its block, which it does in language models but OPT, OLMo 2, Gemma 2 and 3 and mixtures."""

    def repairs(self, architecture: Architecture) -> bool:
        """`repair`, made definite."""
        return can_fill_gaps(architecture) if self.repair is None else self.repair

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


class PruneWidth(Step):
    """Remove those channels inside the blocks' feed-forward parts that the outputs miss least, as many in every block.

    Leaves a smaller dense model that any loader reads by its config alone. Runs the model over calibration text block by
    block, with one block in memory; each block is calibrated on what the narrower blocks before it give.
    """

    needs_calibration: ClassVar[bool] = True

    technique: Literal["prune.width"] = "prune.width"
    drop_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of each block's channels to remove, before rounding."""
    round_to: Annotated[int, Field(ge=1, le=65_536)] = 64
    """The width that is left is the nearest multiple of this below the one there was, and at least this; of two as near, the
    larger. Kernels are fastest on multiples of 64 or 128."""
    repair: bool = True
    """Choose by what cannot be made up for, and refit the layer that reads the channels by least squares. False: channels go
    by their own energy, and what stays is as it was."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text the channels' statistics are gathered from: better a dozen for each channel than few."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    """Tokens of one window of calibration text; cut to what the model can take."""
    damping: Annotated[float, Field(gt=0, le=1)] | None = None
    """Added to each channel's mean square, as a share of it: how little what channels have in common on this text is
    trusted. Null: channels over tokens, since what was seen seldom is chance."""

    def damping_for(self, *, channels: int, tokens: int) -> float:
        """`damping`, made definite."""
        return min(1.0, channels / tokens) if self.damping is None else self.damping

    def width_after(self, width: int) -> int | None:
        """How many of `width` channels stay; None where `round_to` leaves no smaller number."""
        most = (width - 1) // self.round_to
        if most == 0:
            return None
        wanted = math.floor((1 - self.drop_ratio) * width / self.round_to + 0.5)
        return self.round_to * min(max(wanted, 1), most)


class PruneHeads(Step):
    """Remove those heads of attention that the outputs miss least, as many in every block: whole groups, that is the query
    heads that share a key and a value head, together with these.

    Leaves a smaller dense model, with a smaller cache, that any loader reads by its config alone. Runs the model over
    calibration text block by block, with one block in memory; each block is calibrated on what those before it give.
    """

    needs_calibration: ClassVar[bool] = True

    technique: Literal["prune.heads"] = "prune.heads"
    drop_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of each block's groups to remove. What is left is the nearest number that the architecture's configuration can
    carry, at least one group fewer; of two as near, the larger."""
    repair: bool = True
    """Choose by what cannot be made up for, and refit the layer that reads the heads by least squares. False: groups go by
    their own energy, and what stays is as it was."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text the heads' statistics are gathered from: better a dozen for each of their channels than few."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    """Tokens of one window of calibration text; cut to what the model can take."""
    damping: Annotated[float, Field(gt=0, le=1)] | None = None
    """As in `prune.width`, of the heads' channels."""

    def damping_for(self, *, channels: int, tokens: int) -> float:
        """`damping`, made definite."""
        return min(1.0, channels / tokens) if self.damping is None else self.damping

    def groups_after(self, groups: int, possible: Sequence[int]) -> int | None:
        """How many of `groups` stay, one of `possible`; None where there is none."""
        wanted = (1 - self.drop_ratio) * groups
        return min(possible, key=lambda n: (abs(n - wanted), -n), default=None)
