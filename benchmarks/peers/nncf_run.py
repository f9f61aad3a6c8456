"""NNCF on PyTorch: AWQ and scale estimation, 4 bits symmetric; embeddings and head left as they are.

What is written is the compressed model's state dict: NNCF's `get_config` refuses weights in 4 bits. Where AWQ multiplies
a layer's inputs by an operation of its own, the dense weights carry that factor instead, which is the same function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import torch
from job import Job, Meter, block_linears, main
from nncf.torch.quantization.layers import INT4SymmetricWeightsDecompressor
from safetensors.torch import load_file, save_file
from torch import Tensor

# Where a compressed model's state dict keeps what belongs to NNCF.
_HOOKS = "__nncf_hooks."


def quantize(job: Job, meter: Meter) -> None:
    if job.bits != 4:
        raise ValueError("NNCF compresses to 4 bits or 8")
    with meter.part("load"):
        model = job.original(job.options.get("dtype", torch.float32))
    model.config.use_cache = False
    windows = job.calibration()
    inputs: list[dict[str, Any]] = [
        {"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows
    ]
    with meter.part("quantize"):
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            ratio=1.0,
            group_size=job.group_size,
            # Embeddings and head are left as they are.
            backup_mode=nncf.BackupMode.NONE,
            dataset=nncf.Dataset(inputs),
            subset_size=len(windows),
            awq=True,
            scale_estimation=True,
        )
    with meter.part("save"):
        artifact = Path(job.artifact)
        artifact.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, artifact / "model.safetensors")


@torch.no_grad()
def dense_weights(job: Job) -> dict[str, Tensor]:
    """Unpack each weight by NNCF's own decompressor of its 4 bits, and fold in the factor of its inputs, if any."""
    state = load_file(Path(job.artifact) / "model.safetensors")
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(_HOOKS)}
    layers = block_linears(job.original("auto"))
    for name, layer in layers.items():
        scale = state[f"{_HOOKS}post_hooks.{name.replace('.', ':')}:weight__0.0._scale"]
        grouped = (*scale.shape[:2], layer.in_features // scale.shape[1])
        unpack = INT4SymmetricWeightsDecompressor(scale, grouped, layer.weight.shape, torch.float32)
        # It holds scales in 16 bits, in which products would be rounded once more.
        unpack.float()
        weights[f"{name}.weight"] = unpack(state[f"{name}.weight"])
        factor = state.get(f"{_HOOKS}pre_hooks.{name.replace('.', '/')}/linear/0__0.0._scale_value")
        if factor is not None:
            weights[f"{name}.weight"] *= factor.reshape(1, -1)
    hooks = sum(name.startswith(_HOOKS) and name.endswith("._scale") for name in state)
    if hooks != len(layers):
        raise ValueError(f"{hooks} layers were compressed, not the {len(layers)} inside blocks")
    return weights


if __name__ == "__main__":
    main(quantize, dense_weights, ["nncf"])
