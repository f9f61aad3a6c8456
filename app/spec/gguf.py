"""Parameters of quantization to GGUF, the format of llama.cpp and what is built on it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.spec.base import Family, Format, Step

Mix = Literal["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0"]


class QuantizeGguf(Step):
    """Store the weights in llama.cpp's block formats, in one GGUF file with the tokenizer inside.

    Scales are searched for the least error on the inputs that calibration text gives, then weights are rounded with
    compensation (GPTQ, Frantar 2022). The file runs in llama.cpp, Ollama and LM Studio, on CPUs, Metal and GPUs.
    Which tensor gets which format is what llama.cpp's own quantizer does for a mix of the same name.
    """

    families: ClassVar[frozenset[Family]] = frozenset({Family.CAUSAL_LM})
    needs_calibration: ClassVar[bool] = True
    produces: ClassVar[Format] = "gguf"

    technique: Literal["quantize.gguf"] = "quantize.gguf"
    mix: Mix = "Q4_K_M"
    """Formats by name: the number is the bits of most weights. `Q4_K_M` is the usual trade, `Q8_0` nearly lossless.
    Where a layer's inputs are no multiple of 256 the K formats do not fit: they give way to Q5_0, Q5_1 and Q8_0."""
    compensate: bool = True
    """Round weights one after the other, each making up for those before it. False: each to the nearest; a third of
    the time, and further from the original."""
    calibration_tokens: Annotated[int, Field(ge=128, le=10_000_000)] = 32_768
    """Tokens of calibration text the layers' inputs are gathered from; the time grows with it."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of each layer's input statistics, as a share of its mean."""
