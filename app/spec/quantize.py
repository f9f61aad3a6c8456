"""Parameters of the quantization techniques."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.spec.base import Family, Format, Frozen, Step
from app.spec.nf4 import BLOCK

GlobPatterns = Annotated[tuple[str, ...], Field(max_length=1000)]


Bits = Literal[8, 4, 3, 2]
NumberFormat = Literal["int", "fp8", "mxfp4", "nvfp4", "nf4"]
Activations = Literal["none", "dynamic", "static"]
ScaleSearch = Literal["mse", "absmax", "hqq"]
GroupSize = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]

FP8_BLOCK = 128
"""Rows and columns of the blocks that share a scale with `group_size: "block"`."""
# What follows from the format, and need not be said: bits, and inputs that share a scale.
_IMPLIED: dict[NumberFormat, tuple[int, int | None]] = {
    "fp8": (8, None), "mxfp4": (4, 32), "nvfp4": (4, 16), "nf4": (4, BLOCK),
}  # fmt: skip
# The largest that divides is taken; all have kernels in vLLM.
_AUTO_SIZES = (128, 64, 32)


CalibrationImages = Annotated[int, Field(ge=1, le=100_000)]


class LayerOverride(Frozen):
    """Other settings for the layers that match; what is left out is as in the step."""

    layers: Annotated[str, Field(min_length=1, max_length=500)]
    """Shell pattern on module names, e.g. `*down_proj`. Where several match a layer, the last one counts."""
    bits: Bits | None = None
    """Bits per weight."""
    group_size: GroupSize | Literal["channel"] | None = None
    """Input features that share one scale; `channel`: one scale per output channel."""
    symmetric: bool | None = None
    """Whether there is no zero point."""


class QuantizedWeights(Step):
    """What all techniques share that store the weights of linear layers in few bits."""

    families: ClassVar[frozenset[Family]] = frozenset(Family)
    produces: ClassVar[Format] = "compressed-tensors"
    also_produces: ClassVar[frozenset[Format]] = frozenset({"bitsandbytes"})

    technique: str
    number_format: NumberFormat = "int"
    """`int`: integers. `fp8`: E4M3, for GPUs from Ada and Hopper on. `mxfp4`: E2M1 in groups of 32 with a power of two as
    scale. `nvfp4`: E2M1 in groups of 16 with an E4M3 scale, for Blackwell GPUs. `nf4`: quantiles of a normal distribution in
    groups of 64 with a float32 scale, written for bitsandbytes, which QLoRA trains on. The last three imply bits and groups."""
    bits: Bits = 4
    """Bits per weight, scales not counted. 8 is nearly lossless; 4 is the usual trade; 3 and 2 cost quality."""
    group_size: GroupSize | Literal["auto", "tensor", "block"] | None = None
    """Input features that share one scale. Null: one scale per output channel. Must divide every layer's inputs.
    `auto`: the largest of 128, 64 and 32 that does, or else null. With fp8 also `tensor`: one scale per weight, shared by
    those that are served fused; `block`: one per 128 x 128 weights."""
    symmetric: bool = True
    """True: zero maps to zero and no zero point is stored. False: one zero point per scale, better at few bits."""
    double_quantized: bool = False
    """With nf4: scales in 8 bits, 4.13 bits a weight instead of 4.5 (Dettmers et al. 2023, sec. 3)."""
    activations: Activations = "none"
    """How the layers' inputs are rounded when the result is served, to the weights' format (8 bits for `int`). `none`:
    not. `dynamic`: scales found anew for each token. `static`: one scale per layer, from calibration text."""
    ignore: GlobPatterns = ()
    """Layers left as they are: shell patterns on module names, e.g. `*.layers.0.*`, `*down_proj`."""
    overrides: Annotated[tuple[LayerOverride, ...], Field(max_length=100)] = ()
    """Other settings for some layers, e.g. 8 bits for `*down_proj`. Integers without activations only."""
    include_head: bool = False
    """Quantize the layer that gives the logits too, always rounded to nearest; `overrides` may name it, e.g. `lm_head` in 8
    bits. Integers without activations only, and not where it shares its weights with the token embedding."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_what_the_format_implies(cls, given: Any) -> Any:
        chosen = given.get("number_format") if isinstance(given, dict) else None
        if not isinstance(chosen, str) or chosen not in _IMPLIED:
            return given
        bits, group_size = _IMPLIED[chosen]
        return {"bits": bits, "group_size": group_size} | given

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        problem = (
            _integer_problem(self) if self.number_format == "int" else _float_problem(self)
        ) or self._activation_problem()
        if self.double_quantized and self.number_format != "nf4":
            problem = f"double_quantized: {self.number_format} has no scales of scales; leave it out"
        if problem:
            raise ValueError(problem)
        return self

    @property
    def output_format(self) -> Format:
        """compressed-tensors knows no NF4."""
        return "bitsandbytes" if self.number_format == "nf4" else self.produces

    def _activation_problem(self) -> str | None:
        """What is wrong with `activations`, if anything."""
        if self.include_head and (self.number_format, self.activations) != ("int", "none"):
            return "include_head: vLLM runs the head in integers, its inputs as they are; leave it out"
        if self.activations != "none" and self.overrides:
            return "overrides: with activations all layers are stored alike; use ignore, or activations none"
        if self.activations == "static" and (
            self.number_format not in ("int", "fp8") or self.group_size == "block"
        ):
            return "activations: static needs int, or fp8 with group_size null or tensor; use dynamic"
        return None

    def settings_of(self, module: str) -> WeightSettings:
        """How the weight of a module is stored, overrides applied; `auto` must have been resolved."""
        bits, group_size, symmetric = self.bits, self.group_size, self.symmetric
        for override in self.overrides:
            if not fnmatchcase(module, override.layers):
                continue
            bits = override.bits or bits
            if override.group_size is not None:
                group_size = None if override.group_size == "channel" else override.group_size
            if override.symmetric is not None:
                symmetric = override.symmetric
        if group_size == "auto":
            raise ValueError("group_size auto is resolved by with_group_size_for")
        return WeightSettings(
            self.number_format, bits, group_size, symmetric, self.activations, self.double_quantized
        )

    def with_group_size_for(self, inputs: Iterable[int]) -> Self:
        """The same with `auto` made definite for layers with so many inputs."""
        if self.group_size != "auto":
            return self
        common = math.gcd(*inputs)
        size = next((size for size in _AUTO_SIZES if common % size == 0), None)
        return self.model_copy(update={"group_size": size})


def _integer_problem(step: QuantizedWeights) -> str | None:
    if step.group_size in ("tensor", "block"):
        return f"group_size: {step.group_size} is for fp8; give a number, auto or null"
    if step.activations != "none" and (step.bits, step.group_size, step.symmetric) != (8, None, True):
        return "activations: with integers, runtimes take 8 bits, symmetric, one scale per output channel (group_size null)"
    return None


def _float_problem(step: QuantizedWeights) -> str | None:
    bits, group_size = _IMPLIED[step.number_format]
    if step.bits != bits:
        return f"bits: {step.number_format} has {bits}; leave bits out"
    allowed = (None, "tensor", "block") if step.number_format == "fp8" else (group_size,)
    if step.group_size not in allowed:
        known = ", ".join("null" if size is None else str(size) for size in allowed)
        return f"group_size: {step.number_format} takes {known}"
    if not step.symmetric:
        return f"symmetric: {step.number_format} has no zero points"
    if step.number_format == "nf4" and step.activations != "none":
        return "activations: bitsandbytes rounds no inputs of NF4 layers; leave it out"
    return "overrides: they change integers only; use ignore" if step.overrides else None


@dataclass(frozen=True)
class WeightSettings:
    """How one weight is stored."""

    number_format: NumberFormat
    bits: int
    group_size: int | Literal["tensor", "block"] | None
    """Input features that share a scale; None: all of an output channel."""
    symmetric: bool
    activations: Activations
    double_quantized: bool = False

    @property
    def divisor(self) -> int:
        """What must divide the layer's inputs."""
        return (
            FP8_BLOCK
            if self.group_size == "block"
            else self.group_size
            if isinstance(self.group_size, int)
            else 1
        )


class QuantizeWeights(QuantizedWeights):
    """Store the weights of linear layers in few bits with searched scales.

    Round to nearest, no calibration data. Streams tensor by tensor: memory does not grow with the model.
    Written as compressed-tensors, which transformers and vLLM load; NF4 for bitsandbytes.
    """

    technique: Literal["quantize.weights"] = "quantize.weights"
    scale_search: ScaleSearch = "mse"
    """`mse`: search the scale with the least squared error. `absmax`: scale to the largest weight; faster, worse. `hqq`:
    keep most weights close and let a few be far off (half-quadratic, Badri & Shaji 2023); slower than `mse`."""

    @model_validator(mode="after")
    def _needs_no_calibration(self) -> Self:
        if self.scale_search == "hqq" and self.number_format != "int":
            raise ValueError("scale_search: hqq is for integers; leave it out")
        if self.activations == "static" or (self.activations == "dynamic" and self.number_format == "nvfp4"):
            raise ValueError(
                f"activations: {self.activations} for {self.number_format} needs a range from calibration text; "
                "use quantize.calibrated"
            )
        return self


class QuantizeCalibrated(QuantizedWeights):
    """The same grids and files, with codes and scales chosen by what calibration text does to each layer's outputs.

    Runs the model over calibration text block by block, with one block in memory; each block is calibrated on what the
    quantized blocks before it give. Slower than `quantize.weights`, and closer to the original at equal bits.
    """

    needs_calibration: ClassVar[bool] = True

    technique: Literal["quantize.calibrated"] = "quantize.calibrated"
    solver: Literal["gptq", "signround", "nearest"] = "gptq"
    """`gptq`: what rounding one weight loses, those not yet rounded make up for (Frantar et al. 2022), then scales and
    codes are refined together. `signround`: from there, each block is trained to give what the original block gave
    (Cheng et al. 2023); the slow, better setting. `nearest`: round to nearest, with scales searched where inputs are
    large (imatrix)."""
    tuning_steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Steps of training for each block with `signround`; 200 is better and takes four times as long."""
    refinements: Annotated[int, Field(ge=0, le=20)] | None = None
    """Rounds of refitting scales and descending on codes after `gptq`. Null: 1 at 8 and 4 bits, 3 at fewer."""
    scaling: Literal["none", "awq", "smoothquant"] = "none"
    """Factors per input channel that make weights easier to round, folded into the norm or layer before; where none can
    take them, the report says so. `awq`: by what large inputs lose (Lin et al. 2023). `smoothquant`: from activations to
    weights, for when activations are rounded too (Xiao et al. 2022)."""
    smoothing_strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """SmoothQuant's α: how much of the range of activations goes to the weights, from 0 (none) to 1 (all). Null: where
    activations are rounded to integers, what is expected to cost least is found for each input; else 0.5."""
    bias_correction: bool = False
    """Add to each layer's bias what its outputs lost on average (Nagel et al. 2019, "Data-Free Quantization Through
    Weight Equalization and Bias Correction", sec. 4.2); layers without a bias are left without."""
    kv_cache: Literal["none", "fp8"] = "none"
    """`fp8`: two scales for each attention, from the largest key and value over the calibration text, with which a server
    can keep its cache in E4M3 (vLLM: `--kv-cache-dtype fp8`): half the memory of 16 bits. `none`: no scales."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 16_384
    """Tokens of calibration text the layers' inputs are gathered from; the time grows with it."""
    calibration_images: CalibrationImages = 64
    """The same for models of images, which are given so many of the calibration dataset, drawn by chance."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    """Tokens of one window of calibration text; cut to what the model can take."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Added to the diagonal of each layer's input statistics, as a share of its mean."""

    @model_validator(mode="after")
    def _trains_steps_of_equal_size(self) -> Self:
        if self.solver == "signround" and self.number_format != "int":
            raise ValueError("solver: signround moves codes by equal steps, so it is for integers; use gptq")
        return self

    @model_validator(mode="after")
    def _cache_is_scaled_where_transformers_can_round_it(self) -> Self:
        zero_points = not self.symmetric or any(override.symmetric is False for override in self.overrides)
        if self.kv_cache != "none" and self.number_format == "nf4":
            raise ValueError("kv_cache: bitsandbytes' files have no scales of the cache; leave it out")
        if self.kv_cache != "none" and zero_points:
            raise ValueError(
                "kv_cache: transformers unpacks weights with zero points while it loads them, and then rounds no cache; "
                "set symmetric to true"
            )
        return self
