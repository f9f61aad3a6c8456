"""torchao: integer weights to the nearest, or by HQQ's search of scales, and int8 with dynamic activations.

Needs no calibration. Its 4-bit CPU kernels pack for float16 or bfloat16 alone and have no 2 or 3 bits; `Intx` weights,
stored as int8, hold the same numbers. Written by transformers' TorchAoConfig as safetensors.
"""

from __future__ import annotations

from typing import Any

import torch
from job import Job, Meter, block_linears, main
from torch import Tensor
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

_DTYPES = {2: torch.int2, 3: torch.int3, 4: torch.int4, 8: torch.int8}


def quantize(job: Job, meter: Meter) -> None:
    """transformers quantizes each weight as it loads it, so loading is part of the time."""
    config = TorchAoConfig(_config(job), modules_to_not_convert=["lm_head"])
    with meter.part("quantize"):
        model = AutoModelForCausalLM.from_pretrained(
            job.model,
            dtype=job.options.get("dtype", "auto"),
            device_map="cpu",
            local_files_only=True,
            quantization_config=config,
        )
    with meter.part("save"):
        model.save_pretrained(job.artifact)
        job.tokenizer().save_pretrained(job.artifact)


def _config(job: Job) -> Any:
    if job.int8_activations:
        return Int8DynamicActivationInt8WeightConfig()
    return IntxWeightOnlyConfig(
        weight_dtype=_DTYPES[job.bits],
        granularity=PerGroup(job.group_size) if job.group_size else PerAxis(0),
        intx_choose_qparams_algorithm="hqq_scale_only" if job.method == "hqq" else "affine",
    )


def dense_weights(job: Job) -> dict[str, Tensor]:
    """As transformers loads the artifact; each weight dequantized by torchao itself."""
    model = AutoModelForCausalLM.from_pretrained(job.artifact, dtype=torch.float32, local_files_only=True)
    return {
        f"{name}.weight": layer.weight.dequantize().float() for name, layer in block_linears(model).items()
    }


if __name__ == "__main__":
    main(quantize, dense_weights, ["torchao"])
