"""Parameters of pruning whole channels of convolutional networks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.spec.base import Family, Format, Step
from app.spec.quantize import CalibrationImages


class PruneChannels(Step):
    """Remove whole channels of a convolutional network that came as ONNX, and fine-tune what is left; it leaves as ONNX.

    Channels that only go together (through additions, depthwise convolutions, batch norms, a flattening) are one; grouped
    convolutions keep theirs. One ranking over the whole network decides, so layers keep different shares. What stays makes up
    for what goes by least squares, then is trained on the `training` images: by the original's outputs and, where they
    have labels, by those. Held-out images decide when to stop; the best state is kept.
    """

    families: ClassVar[frozenset[Family]] = frozenset({Family.IMAGE_CLASSIFIER})
    needs_training: ClassVar[bool] = True
    ends_early: ClassVar[bool] = True
    produces: ClassVar[Format] = "onnx"

    technique: Literal["prune.channels"] = "prune.channels"
    macs: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the multiplications that is left, at most. Give this or `channels`; 0.5 if neither is given."""
    channels: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the channels that is left, at most."""
    criterion: Literal["taylor", "magnitude", "norm_scale", "mean_activation", "apoz", "random"] = "taylor"
    """Which channels go. `taylor`: those whose loss changes the loss least, to first order (Molchanov et al. 2019).
    `magnitude`: with small weights. `norm_scale`: that batch norms scale down (Liu et al. 2017). `mean_activation`: that say
    little. `apoz`: that are mostly zero (Hu et al. 2016). `random`: any; the baseline to compare with."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of every layer's channels that stays, whatever the ranking says."""
    round_to: Annotated[int, Field(ge=1, le=1024)] = 8
    """Layers keep a multiple of this many channels, rounded up; kernels are fastest on multiples of 8 or 16."""
    repair: bool = True
    """Refit what reads the channels by least squares and estimate batch norms anew before training."""
    calibration_images: CalibrationImages = 256
    """Images of the training dataset that the criterion and the repair look at."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Softens the distributions of original and result while they are compared."""
    hard_label_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the cross-entropy on the labels, between 0 and 1; the rest is on the original's outputs. Without labels: 0."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5e-4
    """Peak rate of AdamW; warmed up over 5 % of the steps, then cosine to a tenth."""
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Optimizer steps at most."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop training after this many seconds, whatever step it is at. Null: no limit of its own."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Images per optimizer step."""
    evaluate_every: Annotated[int, Field(ge=1)] = 100
    """Steps between looks at the held-out loss."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Looks without a better held-out loss before training stops."""
    held_out_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the training images, from their end, that is never trained on; 1024 at most."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.macs is not None and self.channels is not None:
            raise ValueError("give macs or channels, not both")
        return self

    @property
    def target(self) -> tuple[Literal["macs", "channels"], float]:
        """What is counted, and the share of it that is left."""
        if self.channels is not None:
            return "channels", self.channels
        return "macs", 0.5 if self.macs is None else self.macs
