"""Read a compressed-tensors checkpoint by its specification: the check on our own writers.

Shares no code with the writers: the safetensors library reads the files, and codes are taken bit by bit.
pack-quantized: w = scale · (q − zero_point); a stored code is q + 2^(bits − 1), dense, least significant bits first, in
int32 words. int-quantized, float-quantized: w = scale · q, q int8 or E4M3. mxfp4, nvfp4: w = scale · q, q from the table
of E2M1, the low half of a byte first; the scale is 2^(byte − 127), or E4M3 over the global scale.
Source: compressed-tensors 0.20, compressors/{pack_quantized,naive_quantized,nvfp4,mxfp4}.
"""

from __future__ import annotations

import json
import re
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

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
_PARAMETERS = (
    "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "input_scale", "input_global_scale",
)  # fmt: skip
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
# Bits are unfolded to a byte each: this many rows at a time keep that small.
_CODES_AT_ONCE = 2**21


@dataclass(frozen=True)
class WeightScheme:
    """How `quantization_config` says a weight is stored, and its inputs are rounded."""

    format: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    """None: one scale per row, or for the whole weight."""
    inputs: dict[str, Any] | None
    """None: not."""


@dataclass(frozen=True)
class Schemes:
    """The schemes of a checkpoint, by the targets that name them."""

    by_target: dict[str, WeightScheme]

    def of(self, module: str) -> WeightScheme:
        """By its name, by a pattern on it, or as a linear layer, in this order. Raises VerificationFailed if by none."""
        patterns = (t for t in self.by_target if t.startswith("re:") and re.match(t[3:], module))
        for target in (module, *patterns, "Linear"):
            if target in self.by_target:
                return self.by_target[target]
        raise VerificationFailed(f"config.json does not say how {module} is stored.")


def read_schemes(directory: Path) -> Schemes | None:
    """The schemes a directory's config.json declares, or None when it declares no quantization.

    Raises VerificationFailed for a format that is none of those above.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return None
    groups: list[dict[str, Any]] = list(config["config_groups"].values())
    return Schemes({target: _scheme(group) for group in groups for target in group["targets"]})


def _scheme(group: dict[str, Any]) -> WeightScheme:
    weights = group["weights"]
    if group["format"] not in _FORMATS or weights["dynamic"]:
        raise VerificationFailed(f"config.json declares the unknown format {group['format']}.")
    size = weights["block_structure"][1] if weights["strategy"] == "block" else weights["group_size"]
    inputs = group["input_activations"]
    return WeightScheme(
        group["format"], weights["num_bits"], weights["symmetric"], weights["strategy"], size, inputs
    )


def read_dequantized(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint under its original name: quantized weights in float32, others as stored."""
    schemes = read_schemes(directory)
    names = _names(directory)
    quantized = {name.rpartition(".")[0] for name in names if name.endswith(".weight_scale")}
    for name in names:
        module, _, last = name.rpartition(".")
        if schemes is None or module not in quantized or last == "bias":
            yield name, _tensor(directory, name)
        elif last in ("weight", "weight_packed"):
            yield f"{module}.weight", _dequantized(directory, module, schemes.of(module))
        elif last not in _PARAMETERS:
            raise VerificationFailed(f"{name} is none of the tensors that a quantized layer has.")


def _names(directory: Path) -> list[str]:
    """Of all tensors, file by file."""
    found: list[str] = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found += opened.keys()
    return found


def _dequantized(directory: Path, module: str, scheme: WeightScheme) -> Tensor:
    """(rows, columns), float32."""
    if scheme.format == "pack-quantized":
        return _from_words(directory, module, scheme)
    if scheme.format in ("int-quantized", "float-quantized"):
        return _from_bytes(directory, module, scheme)
    return _from_halves(directory, module, scheme)


def _from_bytes(directory: Path, module: str, scheme: WeightScheme) -> Tensor:
    codes = _tensor(directory, f"{module}.weight").float()
    scales = _tensor(directory, f"{module}.weight_scale").float()
    rows, columns = codes.shape
    size = scheme.group_size or columns
    blocks = (-(-rows // size), columns // size)
    expected = {"channel": (rows, 1), "tensor": (1,), "block": blocks}[scheme.strategy]
    if tuple(scales.shape) != expected:
        raise VerificationFailed(f"{module}.weight_scale has shape {tuple(scales.shape)}.")
    if scheme.strategy == "block":
        scales = scales.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)
    return codes * scales


def _from_halves(directory: Path, module: str, scheme: WeightScheme) -> Tensor:
    packed = _tensor(directory, f"{module}.weight_packed").numpy()
    codes = torch.from_numpy(_E2M1[np.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), -1)])
    stored = _tensor(directory, f"{module}.weight_scale")
    if scheme.format == "mxfp4-pack-quantized":
        scales = torch.exp2(stored.float() - 127)
    else:
        scales = stored.float() / _tensor(directory, f"{module}.weight_global_scale")
    size = scheme.group_size or codes.shape[1]
    if scales.shape != (len(codes), codes.shape[1] // size):
        raise VerificationFailed(f"{module}.weight_scale has shape {tuple(scales.shape)}.")
    return codes * scales.repeat_interleave(size, 1)


def _from_words(directory: Path, module: str, scheme: WeightScheme) -> Tensor:
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
