"""Quantize the layers of one input: the same solver for every grid, whichever algorithm a step asks for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from app.spec.quantize import QuantizeCalibrated
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.export.pack_quantized import PackedLayer
from workers.engine.quantize.compensation import Factor, NotPositiveDefinite, compensated, factorize
from workers.engine.quantize.layer_fit import LayerFit, fit_layer
from workers.engine.quantize.refinement import refined


class LayerSolver:
    """Carries out a step's choices, and keeps what a reader of the report must know."""

    def __init__(self, step: QuantizeCalibrated, threads: int) -> None:
        self.step, self.threads = step, threads
        self.warnings: list[str] = []

    def solve(
        self, weights: dict[str, Tensor], layers: dict[str, PackedLayer], second_moment: Tensor
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
        self, weight: Tensor, layer: PackedLayer, second_moment: Tensor, factor: Factor | None
    ) -> LayerFit:
        # What multiplies an input that is always zero need not be kept, and would only be compensated for.
        weight = weight * (second_moment.diagonal() != 0)
        fit = fit_layer(
            weight,
            layer.grid,
            group_size=layer.group_size,
            dtype=TORCH_DTYPES[layer.dtype],
            importance=second_moment.diagonal(),
            threads=self.threads,
        )
        if factor is None:
            return fit
        fit = compensated(weight, factor, fit, threads=self.threads)
        return refined(
            weight, fit, _damped(second_moment, factor.damping), factor.order,
            rounds=self._refinements(layer), threads=self.threads,
        )  # fmt: skip

    def _refinements(self, layer: PackedLayer) -> int:
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


def _stored_alike(layers: dict[str, PackedLayer]) -> list[list[str]]:
    """Names of layers whose weights may be stacked, since all that matters of how they are stored is the same."""
    alike: dict[PackedLayer, list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault(replace(layer, module="", rows=0), []).append(name)
    return list(alike.values())
