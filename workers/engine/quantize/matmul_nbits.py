"""Weights for MatMulNBits, solved as `quantize.calibrated` solves them: searched, compensated, refined (LayerSolver).

The operator's last block of a row may be shorter than the others. Here it is filled up with inputs that are always
zero: they have no importance, compensate for nothing, and are cut off before the codes are packed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.spec.quantize import QuantizeCalibrated
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.export.onnx_matmul_nbits import PackedMatrix, pack_matrix
from workers.engine.export.pack_quantized import PackedLayer
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit, fit_layer
from workers.engine.quantize.layer_solver import LayerSolver
from workers.engine.quantize.sites import Site, block_sites
from workers.engine.quantize.solutions import Solutions


class NBitsSolver:
    """Quantizes block after block; what it leaves in a block is what a user of the file will run."""

    def __init__(
        self, wanted: frozenset[str], grid: Grid, *, block_size: int, damping: float, threads: int
    ) -> None:
        self.wanted = wanted
        self.grid = grid
        self.block_size = block_size
        self.solutions = Solutions[PackedMatrix]()
        self._solver = LayerSolver(QuantizeCalibrated(damping=damping), threads)
        # One list: what the solver has to say stands in the outcome.
        self._solver.warnings = self.solutions.warnings

    def solve_block(self, block: LiveBlock) -> None:
        """Quantize the wanted layers of a block, and put in their weights what their codes stand for."""
        for site in block_sites(block, self.wanted):
            self._solve_site(site)

    def _solve_site(self, site: Site) -> None:
        columns = len(site.second_moment)
        self.solutions.silent.look_at_inputs(list(site.weights), site.second_moment.diagonal())
        fill = -columns % self.block_size
        moment = functional.pad(site.second_moment, (0, fill, 0, fill))
        whole = {name: functional.pad(weight, (0, fill)) for name, weight in site.weights.items()}
        layers = {name: self._layer(name, weight) for name, weight in whole.items()}
        for name, fit in self._solver.solve(whole, layers, moment).items():
            weight, restored = site.weights[name], fit.restored()[:, :columns]
            matrix = packed(fit, columns, self.grid)
            self.solutions.add(name, matrix, weight, restored, site.second_moment)
            weight.copy_(restored)

    def _layer(self, name: str, weight: Tensor) -> PackedLayer:
        rows, columns = weight.shape
        return PackedLayer(name, rows, columns, "F32", self.grid.bits, self.block_size, self.grid.symmetric)


def round_to_nearest(weight: Tensor, grid: Grid, block_size: int, *, threads: int) -> PackedMatrix:
    """A matrix by searched scales alone, for weights whose inputs nobody has seen."""
    columns = weight.shape[1]
    whole = functional.pad(weight, (0, -columns % block_size))
    fit = fit_layer(whole, grid, group_size=block_size, dtype=torch.float32, threads=threads)
    return packed(fit, columns, grid)


def packed(fit: LayerFit, columns: int, grid: Grid) -> PackedMatrix:
    """The first `columns` of a fit as the operator reads them."""
    return pack_matrix(
        _int16(fit.codes[:, :columns]),
        fit.scale.cpu().numpy(),
        None if grid.symmetric else _int16(fit.zero),
        bits=grid.bits,
        block_size=fit.group_size,
    )


def _int16(numbers: Tensor) -> NDArray[np.int16]:
    array: NDArray[np.int16] = numbers.to(torch.int16).cpu().numpy()
    return array
