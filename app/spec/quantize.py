"""Parameters of the quantization techniques."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.spec.base import Format, Step

GlobPatterns = Annotated[tuple[str, ...], Field(max_length=1000)]


class IntegerWeights(Step):
    """What all techniques share that store the weights of linear layers as integers."""

    produces: ClassVar[Format] = "compressed-tensors"

    technique: str
    bits: Literal[8, 4, 3, 2] = 4
    """Bits per weight, scales not counted. 8 is nearly lossless; 4 is the usual trade; 3 and 2 cost quality."""
    group_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] | None = None
    """Input features that share one scale. Null: one scale per output channel. Must divide every layer's inputs."""
    symmetric: bool = True
    """True: zero maps to zero and no zero point is stored. False: one zero point per scale, better at few bits."""
    ignore: GlobPatterns = ()
    """Layers left as they are: shell patterns on module names, e.g. `*.layers.0.*`, `*down_proj`."""


class QuantizeWeights(IntegerWeights):
    """Store the weights of linear layers as integers with searched scales; activations stay in floating point.

    Round to nearest, no calibration data. Streams tensor by tensor: memory does not grow with the model.
    Written as compressed-tensors `pack-quantized`, which transformers and vLLM load.
    """

    technique: Literal["quantize.weights"] = "quantize.weights"
    scale_search: Literal["mse", "absmax"] = "mse"
    """`mse`: search the scale with the least squared error. `absmax`: scale to the largest weight; faster, worse."""


class QuantizeGptq(IntegerWeights):
    """The same grids and files, with rounding errors made up for by the weights not yet rounded (GPTQ, Frantar 2022).

    Runs the model over calibration text, one block in memory at a time. Slower than `quantize.weights`, and closer to
    the original at equal bits.
    """

    needs_calibration: ClassVar[bool] = True

    technique: Literal["quantize.gptq"] = "quantize.gptq"
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text the layers' inputs are gathered from; the time grows with it."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of each layer's input statistics, as a share of its mean."""
