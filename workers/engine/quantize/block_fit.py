"""Search the grid of every group of a layer's inputs, where the last group of a row may be shorter than the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.compensation import ColumnGrid
from workers.engine.quantize.grid import Fit, Grid, fit_groups

# A core's cache holds a chunk and the two buffers of the search.
_CHUNK_WEIGHTS = 2**17


@dataclass(frozen=True)
class LayerFit:
    """Grids of a whole layer: scale and zero point (rows, groups), codes to the nearest (rows, columns); all float32."""

    scale: Tensor
    zero: Tensor
    codes: Tensor
    group_of: Tensor
    """(columns,), int64: the group of each column."""
    half: int

    @property
    def columns(self) -> ColumnGrid:
        """The same grids as compensated rounding takes them."""
        return ColumnGrid(self.scale, self.zero, self.group_of, self.half)

    def restored(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for: (rows, columns)."""
        return (codes - self.zero[:, self.group_of]) * self.scale[:, self.group_of]


def fit_layer(weight: Tensor, grid: Grid, group_size: int, *, threads: int) -> LayerFit:
    """Search scales and zero points, stored in float32, for a float32 weight (rows, columns) of any number of columns."""
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    # Zeros are on every grid: filling a group up with them adds no error.
    whole = torch.nn.functional.pad(weight, (0, groups * group_size - columns))
    chunk = max(1, _CHUNK_WEIGHTS // whole.shape[1])

    @torch.inference_mode()
    def fit(part: Tensor) -> Fit:
        return fit_groups(part.reshape(-1, group_size), grid, torch.float32, search=True)

    with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(fit, torch.split(whole, chunk)))
    return LayerFit(
        scale=torch.cat([part.scale for part in parts]).view(rows, groups),
        zero=torch.cat([part.zero for part in parts]).view(rows, groups),
        codes=torch.cat([part.codes for part in parts]).view(rows, -1)[:, :columns],
        group_of=torch.arange(columns, device=weight.device) // group_size,
        half=grid.half,
    )
