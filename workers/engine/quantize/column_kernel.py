"""The last few columns of a sweep in one kernel on an NVIDIA GPU: one thread a row, what its columns gave in registers.

Column by column from torch, some six kernels each, launching took 20 times what they ran. The source is compiled where it
runs, by the compiler library that comes with torch (NVRTC): no other compiler is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workers.engine.quantize.grid import Grid, WeightGrid

COLUMNS = 64
"""The most that one call takes."""
_THREADS = 64

_SOURCE = (
    f"#define COLUMNS {COLUMNS}\n"
    """
// All matrices are (columns, rows), and begin at the first of the columns; scales and zero points are (groups, rows).
extern "C" __global__ void round_columns(
    const float* targets, float* codes, float* given, const float* previous, const unsigned char* held,
    const float* coupling, const float* scale, const float* inverse, const float* zero, const long long* groups,
    int rows, int count, int low, int high, int has_previous, int has_held)
{
    __shared__ float moved[COLUMNS * COLUMNS];
    for (int k = threadIdx.x; k < count * count; k += blockDim.x) moved[k] = coupling[k];
    __syncthreads();
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float gave[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        if (j < count) {
            const long long at = (long long)j * rows + row, group = groups[j] * rows + row;
            float target = targets[at];
#pragma unroll
            for (int i = 0; i < j; ++i) target -= moved[j * count + i] * gave[i];
            float code = rintf(fminf(fmaxf(fmaf(target, inverse[group], zero[group]), (float)low), (float)high));
            if (has_held && held[at]) code = zero[group];
            const float weight = (code - zero[group]) * scale[group];
            gave[j] = has_previous ? weight - previous[at] : target - weight;
            codes[at] = code;
            given[at] = gave[j];
        }
    }
}
"""
)


@dataclass(frozen=True)
class ColumnKernel:
    """Rounds up to COLUMNS columns one after the other, to integers from `lowest` to `highest`."""

    compiled: Callable[..., None]
    lowest: int
    highest: int

    def __call__(  # noqa: PLR0913 - what a kernel reads and writes
        self,
        *,
        targets: Tensor,
        codes: Tensor,
        given: Tensor,
        previous: Tensor | None,
        held: Tensor | None,
        coupling: Tensor,
        scale: Tensor,
        inverse: Tensor,
        zero: Tensor,
        groups: Tensor,
    ) -> None:
        """Fill `codes` and `given` of the columns, see `column_sweep`.

        targets, codes, given, previous, held: (columns, rows), contiguous; coupling (columns, columns), row j how far
        column j moves for one of each before it; scale, its inverse and zero: (all groups, rows); groups (columns,), int64.
        """
        count, rows = targets.shape
        arguments: list[Any] = [
            targets, codes, given,
            given if previous is None else previous, given if held is None else held,
            coupling.contiguous(), scale, inverse, zero, groups,
            rows, count, self.lowest, self.highest, int(previous is not None), int(held is not None),
        ]  # fmt: skip
        self.compiled(grid=(-(-rows // _THREADS), 1, 1), block=(_THREADS, 1, 1), args=arguments)


def column_kernel(grid: WeightGrid, device: torch.device) -> ColumnKernel | None:
    """The kernel for a grid of integers on a GPU; None for other grids, and where there is none."""
    if device.type != "cuda" or not isinstance(grid, Grid):
        return None
    compiled = _compiled(device)
    return None if compiled is None else ColumnKernel(compiled, -grid.half, grid.half - 1)


@cache
def _compiled(device: torch.device) -> Callable[..., None] | None:
    """None, and a line in the log, where it cannot be had: then torch does the same, slower."""
    try:
        with torch.cuda.device(device):
            kernel: Callable[..., None] = torch.cuda._compile_kernel(_SOURCE, "round_columns")  # noqa: SLF001
    except (OSError, RuntimeError) as error:
        logging.getLogger(__name__).warning("no kernel for columns, and so slower: %s", error)
        return None
    return kernel
