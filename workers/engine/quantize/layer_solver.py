"""Quantize the layers of one input: the same solver for every grid, whichever algorithm a step asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
        """Fit weights (rows, columns) that share inputs of second moment H (columns, columns), by name.

        Layers stored alike are solved together, row below row.
        """
        alike = _stored_alike(layers)
        stacked = {names: torch.cat([weights[name].float() for name in names]) for names in alike}
        fits = {names: self.nearest(stacked[names], layers[names[0]], second_moment) for names in alike}
        factor = self._factor(second_moment, list(weights)) if self.step.solver != "nearest" else None
        if factor is not None:
            for names in alike:
                fits[names] = compensated(stacked[names], factor, fits[names], threads=self.threads)
            order, damping = factor.order, factor.damping
            # Refining needs H, and no longer its factor, which is as large.
            del factor
            with _damped(second_moment, damping):
                for names in alike:
                    fits[names] = refined(
                        stacked.pop(names), fits[names], second_moment, order,
                        rounds=self._refinements(layers[names[0]]), threads=self.threads,
                    )  # fmt: skip
        return {
            name: fit
            for names, together in fits.items()
            for name, fit in zip(names, _parts(together, [len(weights[n]) for n in names]), strict=True)
        }

    def nearest(self, weight: Tensor, layer: PackedLayer, second_moment: Tensor) -> LayerFit:
        """Round to nearest with searched scales; zeroes what multiplies inputs that are always zero, in place."""
        importance = second_moment.diagonal()
        # What multiplies an input that is always zero need not be kept, and would only be compensated for.
        weight.mul_(importance != 0)
        return fit_layer(
            weight,
            layer.grid,
            group_size=layer.group_size,
            dtype=TORCH_DTYPES[layer.dtype],
            importance=importance,
            threads=self.threads,
        )

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


@contextmanager
def _damped(second_moment: Tensor, damping: float) -> Iterator[None]:
    """H as it was factored, for as long as it is refined with: see `factorize`."""
    diagonal = second_moment.diagonal()
    before = diagonal.clone()
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damping * diagonal.mean())
    yield
    diagonal.copy_(before)


def _stored_alike(layers: dict[str, PackedLayer]) -> list[tuple[str, ...]]:
    """Names of layers whose weights may be stacked, since all that matters of how they are stored is the same."""
    alike: dict[PackedLayer, list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault(replace(layer, module="", rows=0), []).append(name)
    return [tuple(names) for names in alike.values()]


def _parts(fit: LayerFit, rows: list[int]) -> Iterator[LayerFit]:
    """A stack of layers, taken apart."""
    start = 0
    for count in rows:
        yield fit.of_rows(slice(start, start + count))
        start += count
