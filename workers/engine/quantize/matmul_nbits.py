"""Weights for MatMulNBits: scales searched block by block, then rounding errors made up for on calibration text.

Frantar et al. 2022 (GPTQ), as in `compensation.py`; a row whose last block of inputs is shorter is taken as it is.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.checkpoint.selection import non_finite
from workers.engine.export.onnx_matmul_nbits import PackedMatrix, pack_matrix
from workers.engine.quantize.block_fit import LayerFit, fit_layer
from workers.engine.quantize.compensation import Factor, compensated_codes
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.sites import block_sites, factor_of_site
from workers.engine.quantize.solutions import Solutions


class NBitsSolver:
    """Quantizes block after block; what it leaves in a block is what a user of the file will run."""

    def __init__(
        self, wanted: frozenset[str], grid: Grid, *, block_size: int, damping: float, threads: int
    ) -> None:
        self.wanted = wanted
        self.grid = grid
        self.block_size = block_size
        self.damping = damping
        self.threads = threads
        self.solutions = Solutions[PackedMatrix]()

    def solve_block(self, block: LiveBlock) -> None:
        """Quantize the wanted layers of a block. Raises InvalidRequest for weights that are not finite."""
        for site, stored in block_sites(block, self.wanted):
            second_moment = site.second_moment()
            factor = factor_of_site(second_moment, stored, self.damping, self.solutions.warnings)
            for name, weight in zip(site.layers, stored, strict=True):
                self._solve_layer(block.module.get_parameter(f"{name}.weight"), weight, second_moment, factor)

    def _solve_layer(
        self, parameter: Tensor, stored: str, second_moment: Tensor, factor: Factor | None
    ) -> None:
        if not torch.isfinite(parameter).all():
            raise non_finite(stored)
        fit = fit_layer(parameter, self.grid, self.block_size, threads=self.threads)
        # What multiplies an input that is always zero need not be kept, and would only be compensated for.
        weight = parameter * (second_moment.diagonal() != 0)
        codes = (
            fit.codes
            if factor is None
            else compensated_codes(weight, factor, fit.columns, threads=self.threads)
        )
        restored = fit.restored(codes)
        matrix = packed(codes, fit, self.grid, self.block_size)
        self.solutions.add(stored, matrix, parameter, restored, second_moment)
        parameter.copy_(restored)


def round_to_nearest(weight: Tensor, grid: Grid, block_size: int, *, threads: int) -> PackedMatrix:
    """A matrix by searched scales alone, for weights whose inputs nobody has seen."""
    fit = fit_layer(weight, grid, block_size, threads=threads)
    return packed(fit.codes, fit, grid, block_size)


def packed(codes: Tensor, fit: LayerFit, grid: Grid, block_size: int) -> PackedMatrix:
    """Codes (rows, columns) and their grids as the operator reads them."""
    return pack_matrix(
        _int16(codes),
        fit.scale.cpu().numpy(),
        None if grid.symmetric else _int16(fit.zero),
        bits=grid.bits,
        block_size=block_size,
    )


def _int16(numbers: Tensor) -> NDArray[np.int16]:
    array: NDArray[np.int16] = numbers.to(torch.int16).cpu().numpy()
    return array
