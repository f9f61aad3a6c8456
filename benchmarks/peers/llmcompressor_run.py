"""llm-compressor: GPTQ, AWQ, SmoothQuant + GPTQ with int8 activations, SparseGPT and Wanda, as its examples call them.

The model is loaded in the dtype it is stored in, as the examples do; `options.dtype` says otherwise. AWQ in 0.14.0.1 pins
memory for copies to a GPU and fails where there is none: pinning, which changes no value, is left out here.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from job import Job, Meter, main
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor


def quantize(job: Job, meter: Meter) -> None:
    with meter.part("load"):
        model = job.original(job.options.get("dtype", "auto"))
        tokenizer = job.tokenizer()
    windows = job.calibration()
    rows = windows.tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    with meter.part("quantize"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=dataset,
            recipe=_recipe(job),
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
        )
    with meter.part("save"):
        model.save_pretrained(job.artifact, save_compressed=job.pattern is None)
        tokenizer.save_pretrained(job.artifact)


def _recipe(job: Job) -> list[Any]:
    if job.pattern is not None:
        modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job.method]
        structure = "0:0" if job.pattern == "unstructured" else job.pattern
        return [modifier(sparsity=0.5, mask_structure=structure, ignore=["re:.*lm_head"])]
    grid: dict[str, Any] = {"config_groups": {"weights": _scheme(job)}, "ignore": ["lm_head"]}
    if job.method == "gptq":
        return [GPTQModifier(**grid)]
    if job.method == "awq":
        IntermediatesCache.pin_memory = lambda *_: None
        return [AWQModifier(), QuantizationModifier(**grid)]
    if job.method == "smoothquant-gptq":
        return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**grid)]
    raise ValueError(f"unknown method {job.method}")


def _scheme(job: Job) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=job.bits,
        symmetric=True,
        strategy="group" if job.group_size else "channel",
        group_size=job.group_size,
    )
    activations = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    return QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=activations if job.int8_activations else None
    )


def dense_weights(job: Job) -> dict[str, Tensor]:
    """As transformers loads the artifact when told to dequantize it."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if job.pattern is not None:
        pruned = AutoModelForCausalLM.from_pretrained(
            job.artifact, dtype=torch.float32, local_files_only=True
        )
        return dict(pruned.named_parameters())
    model = AutoModelForCausalLM.from_pretrained(
        job.artifact,
        dtype=torch.float32,
        local_files_only=True,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    # Scales and shapes stay beside the weights that they have been made into.
    left = ("_scale", "_zero_point", "_shape")
    return {name: parameter for name, parameter in model.named_parameters() if not name.endswith(left)}


if __name__ == "__main__":
    main(quantize, dense_weights, ["llmcompressor", "compressed-tensors"])
