"""Parameters of the quantization techniques."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.spec.base import Format, Frozen, Step

GlobPatterns = Annotated[tuple[str, ...], Field(max_length=1000)]


Bits = Literal[8, 4, 3, 2]


class LayerOverride(Frozen):
    """Other settings for the layers that match; what is left out is as in the step."""

    layers: Annotated[str, Field(min_length=1, max_length=500)]
    """Shell pattern on module names, e.g. `*down_proj`. Where several match a layer, the last one counts."""
    bits: Bits | None = None
    """Bits per weight."""
    group_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] | Literal["channel"] | None = None
    """Input features that share one scale; `channel`: one scale per output channel."""
    symmetric: bool | None = None
    """Whether there is no zero point."""


class IntegerWeights(Step):
    """What all techniques share that store the weights of linear layers as integers."""

    produces: ClassVar[Format] = "compressed-tensors"

    technique: str
    bits: Bits = 4
    """Bits per weight, scales not counted. 8 is nearly lossless; 4 is the usual trade; 3 and 2 cost quality."""
    group_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] | None = None
    """Input features that share one scale. Null: one scale per output channel. Must divide every layer's inputs."""
    symmetric: bool = True
    """True: zero maps to zero and no zero point is stored. False: one zero point per scale, better at few bits."""
    ignore: GlobPatterns = ()
    """Layers left as they are: shell patterns on module names, e.g. `*.layers.0.*`, `*down_proj`."""
    overrides: Annotated[tuple[LayerOverride, ...], Field(max_length=100)] = ()
    """Other settings for some layers, e.g. 8 bits for `*down_proj`."""

    def settings_of(self, module: str) -> WeightSettings:
        """How the weight of a module is stored, overrides applied."""
        bits, group_size, symmetric = self.bits, self.group_size, self.symmetric
        for override in self.overrides:
            if not fnmatchcase(module, override.layers):
                continue
            bits = override.bits or bits
            if override.group_size is not None:
                group_size = None if override.group_size == "channel" else override.group_size
            if override.symmetric is not None:
                symmetric = override.symmetric
        return WeightSettings(bits, group_size, symmetric)


@dataclass(frozen=True)
class WeightSettings:
    """How one weight is stored."""

    bits: int
    group_size: int | None
    """Input features that share a scale; None: all of an output channel."""
    symmetric: bool


class QuantizeWeights(IntegerWeights):
    """Store the weights of linear layers as integers with searched scales; activations stay in floating point.

    Round to nearest, no calibration data. Streams tensor by tensor: memory does not grow with the model.
    Written as compressed-tensors `pack-quantized`, which transformers and vLLM load.
    """

    technique: Literal["quantize.weights"] = "quantize.weights"
    scale_search: Literal["mse", "absmax"] = "mse"
    """`mse`: search the scale with the least squared error. `absmax`: scale to the largest weight; faster, worse."""


class QuantizeCalibrated(IntegerWeights):
    """The same grids and files, with codes and scales chosen by what calibration text does to each layer's outputs.

    Runs the model over calibration text block by block, with one block in memory; each block is calibrated on what the
    quantized blocks before it give. Slower than `quantize.weights`, and closer to the original at equal bits.
    """

    needs_calibration: ClassVar[bool] = True

    technique: Literal["quantize.calibrated"] = "quantize.calibrated"
    solver: Literal["gptq", "nearest"] = "gptq"
    """`gptq`: what rounding one weight loses, those not yet rounded make up for (Frantar et al. 2022), then scales and
    codes are refined together. `nearest`: round to nearest, with scales searched where inputs are large (imatrix)."""
    refinements: Annotated[int, Field(ge=0, le=20)] | None = None
    """Rounds of refitting scales and descending on codes after `gptq`. Null: 1 at 8 and 4 bits, 3 at fewer."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text the layers' inputs are gathered from; the time grows with it."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    """Tokens of one window of calibration text; cut to what the model can take."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of each layer's input statistics, as a share of its mean."""
