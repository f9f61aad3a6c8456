"""Quantize the layers of one input: the same solver for every grid, whichever algorithm a step asks for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from app.spec.quantize import QuantizeCalibrated
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.quantize.compensation import Factor, NotPositiveDefinite, compensated, factorize
from workers.engine.quantize.layer_fit import LayerFit, fit_blocks, fit_layer
from workers.engine.quantize.refinement import descended, refined


class LayerSolver:
    """Carries out a step's choices, and keeps what a reader of the report must know."""

    def __init__(self, step: QuantizeCalibrated, threads: int) -> None:
        self.step, self.threads = step, threads
        self.warnings: list[str] = []

    def solve(
        self, weights: dict[str, Tensor], layers: Mapping[str, StoredLayer], second_moment: Tensor
    ) -> dict[str, LayerFit]:
        """Fit weights (rows, columns), float32, that share inputs of second moment H (columns, columns), by name.

        Layers stored alike are solved together, row below row.
        """
        factor = self._factor(second_moment, list(weights)) if self.step.solver == "gptq" else None
        fits: dict[str, LayerFit] = {}
        for names in _stored_alike(layers):
            together = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
            fit = self._solve(together, layers[names[0]], second_moment, factor)
            start = 0
            for name in names:
                rows = slice(start, start + len(weights[name]))
                fits[name], start = fit.of_rows(rows), rows.stop
        return fits

    def _solve(
        self, weight: Tensor, layer: StoredLayer, second_moment: Tensor, factor: Factor | None
    ) -> LayerFit:
        # What multiplies an input that is always zero need not be kept, and would only be compensated for.
        weight = weight * (second_moment.diagonal() != 0)
        fit = self._nearest(weight, layer, second_moment.diagonal())
        if factor is None:
            return fit
        fit = compensated(weight, factor, fit, threads=self.threads)
        damped, rounds = _damped(second_moment, factor.damping), self._refinements(layer)
        if layer.block_rows == 1:
            return refined(weight, fit, damped, factor.order, rounds=rounds, threads=self.threads)
        # Rows that share scales cannot each have them refitted.
        for _ in range(rounds):
            fit = descended(weight, fit, damped, factor.order, threads=self.threads)
        return fit

    def _nearest(self, weight: Tensor, layer: StoredLayer, importance: Tensor) -> LayerFit:
        """Scales searched with the importance of each input (columns,), and the nearest codes."""
        grid, dtype = layer.grid(float(weight.abs().max())), TORCH_DTYPES[layer.dtype]
        if layer.block_rows > 1:
            return fit_blocks(weight, grid, size=layer.block_rows, dtype=dtype, importance=importance)
        return fit_layer(
            weight,
            grid,
            group_size=layer.group_size,
            dtype=dtype,
            importance=importance,
            threads=self.threads,
        )

    def _refinements(self, layer: StoredLayer) -> int:
        if self.step.refinements is not None:
            return self.step.refinements
        return 3 if layer.bits < 4 else 1

    def _factor(self, second_moment: Tensor, stored: list[str]) -> Factor | None:
        """What all layers of an input share; None, with a warning that names them, where there is no factor."""
        names = ", ".join(stored)
        try:
            factor = factorize(second_moment, self.step.damping)
        except NotPositiveDefinite:
            self.warnings.append(f"rounded to nearest, since the inputs' statistics have no factor: {names}")
            return None
        if factor.damping > self.step.damping:
            self.warnings.append(f"damped by {factor.damping:g} to have a factor: {names}")
        return factor


def _damped(second_moment: Tensor, damping: float) -> Tensor:
    """H as it was factored: with a moment for inputs that were always zero, and damping on the diagonal."""
    damped = second_moment.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damping * diagonal.mean())
    return damped


def _stored_alike(layers: Mapping[str, StoredLayer]) -> list[list[str]]:
    """Names of layers whose weights may be stacked, since all that matters of how they are stored is the same."""
    alike: dict[Hashable, list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault(layer.alike, []).append(name)
    return list(alike.values())
