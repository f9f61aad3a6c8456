"""Read NF4 by bitsandbytes' specification: the check on our own writer, and what results are measured with.

Shares no code with the writer: the safetensors library reads the files. w = table[half] · absmax, the high half of a byte
first, in blocks along the flattened weight; absmax double-quantized is nested_quant_map[place] · nested_absmax + offset.
Source: bitsandbytes 0.50, functional.py (`QuantState.from_dict`, `dequantize_4bit`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.errors import VerificationFailed
from app.spec.base import Format
from workers.engine.architectures.loading import model_from_tensors
from workers.engine.checkpoint.layout import weight_files

FORMAT: Final[Format] = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)
# bitsandbytes' kernels have these built in, whatever a file says.
_TABLE = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=np.float32)  # fmt: skip


def is_declared(declared: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` is bitsandbytes'."""
    return declared is not None and declared.get("quant_method") == FORMAT


def load_nf4(directory: Path, auto: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a directory with its weights unpacked to float32, and what transformers says of loading them.

    `auto` is the transformers class that would load the original. Raises VerificationFailed for a file that bitsandbytes
    would read otherwise than it says.
    """
    return model_from_tensors(directory, auto, dict(read_nf4(directory)))


def read_nf4(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its original name: quantized weights (rows, columns) in float32, others as stored."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    quantized = {name.removesuffix(_STATE) for name in files if name.endswith(_STATE)}
    for name, file in files.items():
        if name in quantized:
            parts = {
                part: _tensor(files[name + part], name + part) for part in _PARTS if name + part in files
            }
            yield name, _unpacked(name, _tensor(file, name), parts)
        elif name.rpartition(".weight.")[0] + ".weight" not in quantized:
            yield name, _tensor(file, name)


def _unpacked(name: str, packed: Tensor, parts: dict[str, Tensor]) -> Tensor:
    state = json.loads(bytes(parts[_STATE].numpy()))
    if state["quant_type"] != "nf4" or not np.array_equal(parts[".quant_map"].numpy(), _TABLE):
        raise VerificationFailed(f"{name} is not stored as NF4.")
    octets = packed.numpy().reshape(-1)
    weight = np.empty((len(octets), 2), dtype=np.float32)
    weight[:, 0], weight[:, 1] = _TABLE[octets >> 4], _TABLE[octets & 15]
    weight = weight.reshape(-1, state["blocksize"])
    weight *= _scales(state, parts)[:, None]
    return torch.from_numpy(weight.reshape(state["shape"]))


def _scales(state: dict[str, Any], parts: dict[str, Tensor]) -> NDArray[np.float32]:
    """The scale of each block: (blocks,)."""
    stored: NDArray[Any] = parts[".absmax"].numpy()
    if ".nested_absmax" not in parts:
        return stored
    nested: NDArray[np.float32] = parts[".nested_absmax"].numpy().repeat(state["nested_blocksize"])
    levels: NDArray[np.float32] = parts[".nested_quant_map"].numpy()
    scales: NDArray[np.float32] = levels[stored] * nested[: len(stored)] + np.float32(state["nested_offset"])
    return scales


def _tensor(file: Path, name: str) -> Tensor:
    """One tensor; the file is closed again, and its mapping with it."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
