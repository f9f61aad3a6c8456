"""AutoRound: rounding learnt by signed gradients, `options.iters` steps a block; written in its own packed format."""

from __future__ import annotations

import torch
from auto_round import AutoRound
from job import Job, Meter, block_linears, computed_weight, main
from torch import Tensor


def quantize(job: Job, meter: Meter) -> None:
    with meter.part("load"):
        model = job.original(job.options.get("dtype", "auto"))
        tokenizer = job.tokenizer()
    windows = job.calibration()
    with meter.part("quantize"):
        tuner = AutoRound(
            model,
            tokenizer,
            scheme={
                "bits": job.bits,
                "group_size": job.group_size or -1,
                "sym": True,
                "act_bits": 16,
                "data_type": "int",
            },
            dataset=list(windows.split(8)),
            nsamples=len(windows),
            seqlen=windows.shape[1],
            batch_size=8,
            iters=job.options["iters"],
            device_map="cpu",
        )
        tuner.quantize()
    with meter.part("save"):
        tuner.save_quantized(job.artifact, format="auto_round")


def dense_weights(job: Job) -> dict[str, Tensor]:
    """As AutoRound's own layers compute it, in float32 throughout."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job.artifact, dtype=torch.float32, device_map="cpu", local_files_only=True
    )
    weights = {}
    for name, original in block_linears(job.original(torch.float32)).items():
        layer = model.get_submodule(name)
        # Stored in 16 bits; products in 16 bits would round the weights once more.
        layer.scales = layer.scales.float()
        weights[f"{name}.weight"] = computed_weight(layer, original.in_features)
    return weights


if __name__ == "__main__":
    main(quantize, dense_weights, ["auto-round"])
