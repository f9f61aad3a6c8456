"""Write the compressed-tensors formats `int-quantized` and `float-quantized`: one byte a weight, stored as it is.

`weight` is int8 or E4M3; `weight_scale` has one number per row, per weight, or per block of 128 x 128 weights. Inputs
that are rounded with a fixed scale have it in `input_scale`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from app.spec.facts import TensorFact
from app.spec.quantize import FP8_BLOCK, Activations, ScaleSearch
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.export.stored_layer import Parts, StoredLayer, one_number
from workers.engine.quantize.float_grids import E4M3_MAX, Fp8Grid
from workers.engine.quantize.grid import Grid, WeightGrid
from workers.engine.quantize.layer_fit import LayerFit, fit_blocks

_INT8_MAX = 127.0


@dataclass(frozen=True)
class PlainLayer(StoredLayer):
    """Bytes and scales. `bits` is 8; `group_size` is 128 in blocks and None otherwise."""

    number: Literal["int", "float"]
    strategy: Literal["channel", "tensor", "block"]
    activations: Activations

    @property
    def block_rows(self) -> int:
        """Rows that share a scale, for blocks."""
        return FP8_BLOCK if self.strategy == "block" else 1

    @property
    def row_multiple(self) -> int:
        """Blocks are not cut."""
        return self.block_rows

    @property
    def needs_peak(self) -> bool:
        """With one scale for the weight, which fused layers share."""
        return self.strategy == "tensor"

    @property
    def alike(self) -> Hashable:
        """All but name and rows; blocks begin anew with each layer."""
        return self if self.strategy == "block" else replace(self, module="", rows=0)

    @property
    def weight(self) -> TensorFact:
        """(rows, columns): the codes."""
        return self._fact("weight", "I8" if self.number == "int" else "F8_E4M3", (self.rows, self.columns))

    @property
    def scale(self) -> TensorFact:
        """(rows, 1), (1,), or by blocks."""
        blocks = (-(-self.rows // FP8_BLOCK), self.columns // FP8_BLOCK)
        shape = {"channel": (self.rows, 1), "tensor": (1,), "block": blocks}[self.strategy]
        return self._fact("weight_scale", self.dtype, shape)

    @property
    def input_scale(self) -> TensorFact:
        """(1,), static only."""
        return self._fact("input_scale", self.dtype, (1,))

    def facts(self) -> list[TensorFact]:
        """All its tensors."""
        return [self.weight, self.scale] + ([self.input_scale] if self.activations == "static" else [])

    def grid(self, peak: float) -> WeightGrid:
        """What its codes may be."""
        if self.number == "int":
            return Grid(8, symmetric=True)
        # Floating point rounds small numbers as finely as large ones: nothing is won by clipping the largest.
        return Fp8Grid(peak / E4M3_MAX if self.strategy == "tensor" else None)

    def nearest(
        self,
        weight: Tensor,
        grid: WeightGrid,
        *,
        importance: Tensor | None = None,
        search: ScaleSearch = "mse",
        threads: int = 1,
    ) -> LayerFit:
        """See StoredLayer."""
        if self.strategy != "block":
            return super().nearest(weight, grid, importance=importance, search=search, threads=threads)
        dtype, searched = TORCH_DTYPES[self.dtype], search != "absmax"
        return fit_blocks(weight, grid, size=FP8_BLOCK, dtype=dtype, importance=importance, search=searched)

    def parts(self, fit: LayerFit, start: int) -> Parts:
        """What some rows, from `start` on, become."""
        found: Parts = {
            self.weight.name: (start, fit.codes.cpu().to(TORCH_DTYPES[self.weight.dtype])),
            self.scale.name: (start // self.block_rows, self._in_dtype(fit.scale[:: self.block_rows])),
        }
        if self.strategy == "tensor":
            del found[self.scale.name]
            if start == 0:
                found[self.scale.name] = (0, self._in_dtype(fit.scale[0]))
        return found

    def input_parts(self, peak: float | None) -> dict[str, Tensor]:
        """The fixed scale of the inputs, rounded to the checkpoint's dtype; one for inputs that were always zero."""
        if self.activations != "static":
            return {}
        if peak is None:
            raise ValueError(f"{self.module} has no calibrated range of inputs")
        scale = one_number(peak / (_INT8_MAX if self.number == "int" else E4M3_MAX), TORCH_DTYPES[self.dtype])
        return {self.input_scale.name: torch.where(scale == 0, torch.ones_like(scale), scale)}

    def scheme(self) -> dict[str, Any]:
        """Its entry in `config_groups`, without the targets."""
        common: dict[str, Any] = {"num_bits": 8, "type": self.number, "symmetric": True, "group_size": None}
        weights = common | {"strategy": self.strategy, "dynamic": False}
        if self.strategy == "block":
            weights["block_structure"] = [FP8_BLOCK, FP8_BLOCK]
        dynamic = (
            {"strategy": "token"}
            if self.strategy != "block"
            else {"strategy": "group", "group_size": FP8_BLOCK}
        )
        inputs = {
            "none": None,
            "dynamic": common | {"dynamic": True} | dynamic,
            "static": common | {"dynamic": False, "strategy": "tensor"},
        }[self.activations]
        return {"weights": weights, "input_activations": inputs, "format": f"{self.number}-quantized"}
