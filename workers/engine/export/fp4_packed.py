"""Write the compressed-tensors formats `mxfp4-pack-quantized` and `nvfp4-pack-quantized`: E2M1, two weights a byte.

The earlier of two weights is in the low half; a half is the sign above the index of the magnitude among 0, ½, 1, 1½, 2,
3, 4, 6. MXFP4's `weight_scale` is the exponent of two plus 127, a byte. NVFP4's is E4M3, to be divided by the float32 in
`weight_global_scale`; inputs that are rounded have a global scale of their own, and group scales found as they come.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from app.spec.facts import TensorFact
from app.spec.quantize import Activations
from workers.engine.export.stored_layer import Parts, StoredLayer, one_number
from workers.engine.quantize.float_grids import Mxfp4Grid, Nvfp4Grid, global_scale
from workers.engine.quantize.layer_fit import LayerFit

_E8M0_BIAS = 127


@dataclass(frozen=True)
class Fp4Layer(StoredLayer):
    """Halves of bytes, scales of groups, and with NVFP4 global scales. `bits` is 4; `group_size` 32 or 16."""

    number: Literal["mxfp4", "nvfp4"]
    activations: Activations

    @property
    def needs_peak(self) -> bool:
        """With a global scale, which fused layers share."""
        return self.number == "nvfp4"

    @property
    def alike(self) -> Hashable:
        """All but name and rows."""
        return replace(self, module="", rows=0)

    @property
    def packed(self) -> TensorFact:
        """(rows, columns / 2)."""
        return self._fact("weight_packed", "U8", (self.rows, self.columns // 2))

    @property
    def scale(self) -> TensorFact:
        """(rows, groups)."""
        dtype = "U8" if self.number == "mxfp4" else "F8_E4M3"
        return self._fact(
            "weight_scale", dtype, (self.rows, self.columns // (self.group_size or self.columns))
        )

    @property
    def global_scale(self) -> TensorFact:
        """(1,), NVFP4 only."""
        return self._fact("weight_global_scale", "F32", (1,))

    @property
    def input_global_scale(self) -> TensorFact:
        """(1,), NVFP4 with rounded inputs only."""
        return self._fact("input_global_scale", "F32", (1,))

    def facts(self) -> list[TensorFact]:
        """All its tensors."""
        if self.number == "mxfp4":
            return [self.packed, self.scale]
        inputs = [self.input_global_scale] if self.activations == "dynamic" else []
        return [self.packed, self.scale, self.global_scale, *inputs]

    def grid(self, peak: float) -> Mxfp4Grid | Nvfp4Grid:
        """What its codes may be."""
        return Mxfp4Grid() if self.number == "mxfp4" else Nvfp4Grid(global_scale(peak))

    def parts(self, fit: LayerFit, start: int) -> Parts:
        """What some rows, from `start` on, become."""
        found: Parts = {self.packed.name: (start, pack_e2m1(fit.codes.cpu()))}
        if isinstance(fit.grid, Nvfp4Grid):
            found[self.scale.name] = (start, fit.grid.local_scale(fit.scale).cpu())
            if start == 0:
                found[self.global_scale.name] = (0, one_number(fit.grid.global_scale, torch.float32))
        else:
            exponents = torch.log2(fit.scale).round() + _E8M0_BIAS
            found[self.scale.name] = (start, exponents.to(torch.uint8).cpu())
        return found

    def input_parts(self, peak: float | None) -> dict[str, Tensor]:
        """The global scale of the inputs."""
        if self.number == "mxfp4" or self.activations == "none":
            return {}
        if peak is None:
            raise ValueError(f"{self.module} has no calibrated range of inputs")
        return {self.input_global_scale.name: one_number(global_scale(peak), torch.float32)}

    def scheme(self) -> dict[str, Any]:
        """Its entry in `config_groups`, without the targets."""
        dtype = "torch.uint8" if self.number == "mxfp4" else "torch.float8_e4m3fn"
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group" if self.number == "mxfp4" else "tensor_group",
            "group_size": self.group_size,
            "dynamic": False,
            "scale_dtype": dtype,
            "zp_dtype": dtype,
        }
        inputs = weights | {"dynamic": True if self.number == "mxfp4" else "local"}
        return {
            "weights": weights,
            "input_activations": None if self.activations == "none" else inputs,
            "format": f"{self.number}-pack-quantized",
        }


def pack_e2m1(codes: Tensor) -> Tensor:
    """Two numbers a byte: (rows, columns) of E2M1 numbers, float32 -> (rows, columns / 2), uint8."""
    magnitude = codes.abs()
    # Below 2 numbers are ½ apart and their index is twice as much; above, it is 4, 5, 6, 7 for 2, 3, 4, 6.
    index = torch.where(
        magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4)
    )
    halves = index.to(torch.uint8) | (torch.signbit(codes) & (magnitude > 0)).to(torch.uint8) << 3
    return halves[:, ::2] | halves[:, 1::2] << 4
