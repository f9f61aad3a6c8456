"""Parameters of quantization to ONNX."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.spec.base import Family, Format, Step
from app.spec.quantize import CalibrationImages, GlobPatterns


class QuantizeOnnx(Step):
    """Quantize every linear layer inside blocks and write an ONNX graph; a layer that stays in float is named, with why.

    Of image classifiers every convolution and linear layer is quantized, batch norms folded into them, by `qdq` alone.
    Calibrated on text, or images: rounding errors are made up for as in `quantize.calibrated`, and `qdq` takes the ranges of its
    activations from there. Which of the methods is smallest, fastest or closest depends on the model; `optimize.onnx`
    times float and dynamic int8 on the worker instead.
    """

    families: ClassVar[frozenset[Family]] = frozenset(Family)
    needs_calibration: ClassVar[bool] = True
    produces: ClassVar[Format] = "onnx"

    technique: Literal["quantize.onnx"] = "quantize.onnx"
    method: Literal["matmul_nbits", "qdq", "auto"] = "matmul_nbits"
    """`matmul_nbits`: onnxruntime's operator for weights of few bits with a scale per block; keeps language models close.
    `qdq`: standard QuantizeLinear and DequantizeLinear, int8 weights and static int8 activations, for whatever reads
    ONNX; the fastest for encoders, and too coarse for many language models. `auto`: `qdq` for encoders and image
    classifiers where the other settings allow it, else `matmul_nbits`."""
    bits: Literal[8, 4] = 8
    """Bits per weight, scales not counted. `qdq` knows 8 alone."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Input features that share a scale of 32 bits, in `matmul_nbits`. The last block may be shorter."""
    symmetric: bool = True
    """True: zero maps to zero. False: a zero point per block, better at 4 bits. `matmul_nbits` alone."""
    quantize_head: bool = False
    """Store the language-model head in 8 bits too, and a tied embedding with it as one table. `matmul_nbits` alone."""
    ignore: GlobPatterns = ()
    """Layers left in float32: shell patterns on module names, e.g. `*.layers.0.*`, `*down_proj`."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 8192
    """Tokens of calibration text the layers' inputs are gathered from; the time grows with it."""
    calibration_images: CalibrationImages = 64
    """The same for models of images, which are given so many of the calibration dataset, drawn by chance; they are run
    together, so memory grows with it too."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of each layer's input statistics, as a share of its mean."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """`qdq`: how much of the spread between input channels is moved into the weights (SmoothQuant's alpha); 0: none."""
    ranges: Literal["mse", "minmax"] = "minmax"
    """`qdq`: `mse` clips activations where that lowers the squared error; `minmax` spans all that were seen."""

    @model_validator(mode="after")
    def _settings_fit_the_method(self) -> Self:
        if self.method == "qdq" and (self.bits != 8 or not self.symmetric or self.quantize_head):
            raise ValueError(
                'method "qdq" stores symmetric 8-bit weights of block layers: leave out bits, symmetric and quantize_head'
            )
        return self

    def method_for(self, family: Family) -> Literal["matmul_nbits", "qdq"]:
        """The method that `auto` stands for."""
        if self.method != "auto":
            return self.method
        return (
            "qdq" if family is not Family.CAUSAL_LM and self.bits == 8 and self.symmetric else "matmul_nbits"
        )
