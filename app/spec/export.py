"""What is written in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from app.spec.base import Format, Frozen


class Export(Frozen):
    """The form of the result."""

    format: Literal["auto", Format] = "auto"
    """`auto`: what the last step writes. Anything else must be what the last step writes, or the job is refused."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    """Weight files are split at this size."""


@dataclass(frozen=True)
class FormatFacts:
    """What a format is for."""

    summary: str
    runtimes: tuple[str, ...]


FORMATS: dict[Format, FormatFacts] = {
    "safetensors": FormatFacts(
        "Plain weights in Hugging Face layout, in the dtype of the original",
        ("transformers", "vLLM", "SGLang", "text-generation-inference", "any reader of safetensors"),
    ),
    "compressed-tensors": FormatFacts(
        "Packed integer weights with scales (`pack-quantized`), Hugging Face layout",
        ("transformers with compressed-tensors", "vLLM", "SGLang"),
    ),
    "onnx": FormatFacts(
        "An ONNX graph with tokenizer and configuration beside it; weights of 8 or 4 bits where they were quantized",
        ("onnxruntime on CPUs, phones and in browsers", "OpenVINO", "TensorRT"),
    ),
    "gguf": FormatFacts(
        "One file of llama.cpp's block formats, tokenizer and chat template inside",
        ("llama.cpp", "Ollama", "LM Studio", "transformers with gguf, unpacked while loading"),
    ),
    "torch-dynamic-int8": FormatFacts(
        "Codes and scales of PyTorch's dynamic int8 in safetensors, read by a loader of forty lines: see docs/techniques.md",
        ("PyTorch on CPUs, with transformers",),
    ),
    "bitsandbytes": FormatFacts(
        "NF4 weights as bitsandbytes serializes them, Hugging Face layout",
        ("transformers with bitsandbytes", "peft (QLoRA)", "vLLM with bitsandbytes"),
    ),
}
