"""Read a compressed-tensors `pack-quantized` checkpoint by its specification: the check on our own writer.

Shares no code with the writer: the safetensors library reads the files, and codes are taken bit by bit.
w = scale · (q − zero_point); a stored code is q + 2^(bits − 1), dense, least significant bits first, in int32 words.
Source: compressed-tensors 0.20, compressors/pack_quantized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from app.errors import VerificationFailed

_PACKED = ".weight_packed"
_PARAMETERS = ("weight_scale", "weight_shape", "weight_zero_point")
# Bits are unfolded to a byte each: this many rows at a time keep that small.
_CODES_AT_ONCE = 2**21


@dataclass(frozen=True)
class WeightScheme:
    """How `quantization_config` says the weights of a checkpoint are stored."""

    bits: int
    symmetric: bool
    group_size: int | None
    """None: one scale per row."""


def read_scheme(directory: Path) -> WeightScheme | None:
    """The scheme a directory's config.json declares, or None when it declares no quantization.

    Raises VerificationFailed for a format other than pack-quantized with one group of integer weights.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return None
    groups: list[dict[str, Any]] = list(config["config_groups"].values())
    weights = groups[0]["weights"]
    if config["format"] != "pack-quantized" or len(groups) != 1 or weights["type"] != "int":
        raise VerificationFailed("config.json does not declare pack-quantized integer weights.")
    group_size = weights["group_size"] if weights["strategy"] == "group" else None
    return WeightScheme(weights["num_bits"], weights["symmetric"], group_size)


def read_dequantized(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint under its original name: quantized weights in float32, others as stored."""
    scheme = read_scheme(directory)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            if scheme is not None and name.rpartition(".")[2] in _PARAMETERS:
                continue
            if scheme is not None and name.endswith(_PACKED):
                module = name.removesuffix(_PACKED)
                yield f"{module}.weight", _dequantized(directory, module, scheme)
            else:
                yield name, _tensor(directory, name)


def _dequantized(directory: Path, module: str, scheme: WeightScheme) -> Tensor:
    """(rows, columns), float32; exact, for codes and scales have fewer bits than a float32 holds."""
    packed = _tensor(directory, f"{module}.weight_packed").numpy()
    scales = _tensor(directory, f"{module}.weight_scale").float()
    rows, columns = _tensor(directory, f"{module}.weight_shape").tolist()
    size = scheme.group_size or columns
    if scales.shape != (rows, columns // size):
        raise VerificationFailed(f"{module}.weight_scale has shape {tuple(scales.shape)}.")
    zeros = torch.zeros_like(scales)
    if not scheme.symmetric:
        stored = _tensor(directory, f"{module}.weight_zero_point").numpy()
        zeros = torch.from_numpy(_codes(stored.T, scheme.bits, rows).T.astype(np.float32))
    weight = torch.empty(rows, columns)
    step = max(1, _CODES_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes = torch.from_numpy(_codes(packed[part], scheme.bits, columns).astype(np.float32))
        levels = codes.view(-1, columns // size, size) - zeros[part].unsqueeze(2)
        weight[part] = (levels * scales[part].unsqueeze(2)).flatten(1)
    return weight


def _codes(packed: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.int16]:
    """Unfold words into codes: (rows, words) -> (rows, count), −2^(bits − 1) … 2^(bits − 1) − 1."""
    octets = np.ascontiguousarray(packed).astype("<i4").view(np.uint8)
    single = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    places = (1 << np.arange(bits)).astype(np.int16)
    return (single.reshape(len(packed), count, bits) @ places - (1 << (bits - 1))).astype(np.int16)


def _tensor(directory: Path, name: str) -> Tensor:
    """One tensor from whichever file holds it; the file is closed again, and its mapping with it."""
    index = directory / "model.safetensors.index.json"
    file = directory / "model.safetensors"
    if not file.is_file():
        file = directory / json.loads(index.read_text())["weight_map"][name]
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
