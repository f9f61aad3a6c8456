"""Quantize the layers of one input: the same solver for every grid, whichever algorithm a step asks for.

Rows do not depend on each other. Small layers that are stored alike are stacked, so that a pass over their columns is
made once; large ones are taken some rows at a time, so that what is beside the weights stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.spec.quantize import QuantizeCalibrated
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.export.pack_quantized import PackedLayer
from workers.engine.quantize.compensation import Factor, NotPositiveDefinite, compensated, factorize
from workers.engine.quantize.layer_fit import LayerFit, fit_layer, joined
from workers.engine.quantize.refinement import refined

# Six float32 copies of them are alive while their scales and codes are refined.
_WEIGHTS_AT_ONCE = 2**23


@dataclass(frozen=True)
class _Batch:
    """Rows of layers that are stored alike."""

    layer: PackedLayer
    parts: tuple[tuple[str, slice], ...]

    def weight(self, weights: dict[str, Tensor], second_moment: Tensor) -> Tensor:
        """Its rows, one below the other: (rows, columns), float32.

        What multiplies an input that is always zero need not be kept, and would only be compensated for.
        """
        rows = torch.cat([weights[name][part].float() for name, part in self.parts])
        return rows.mul_(second_moment.diagonal() != 0)


class LayerSolver:
    """Carries out a step's choices, and keeps what a reader of the report must know."""

    def __init__(self, step: QuantizeCalibrated, threads: int) -> None:
        self.step, self.threads = step, threads
        self.warnings: list[str] = []

    def solve(
        self, weights: dict[str, Tensor], layers: dict[str, PackedLayer], second_moment: Tensor
    ) -> dict[str, LayerFit]:
        """Fit weights (rows, columns) that share inputs of second moment H (columns, columns), by name."""
        batches = list(_batches(layers))
        factor = self._factor(second_moment, list(weights)) if self.step.solver == "gptq" else None
        fits = [self._fit(batch, weights, second_moment, factor) for batch in batches]
        if factor is not None:
            order, damping = factor.order, factor.damping
            # Refining needs H, and no longer its factor, which is as large.
            del factor
            with _damped(second_moment, damping):
                fits = [
                    self._refine(batch, fit, weights, second_moment, order)
                    for batch, fit in zip(batches, fits, strict=True)
                ]
        found: dict[str, list[LayerFit]] = {name: [] for name in layers}
        for batch, fit in zip(batches, fits, strict=True):
            start = 0
            for name, rows in batch.parts:
                stop = start + rows.stop - rows.start
                found[name].append(fit.of_rows(slice(start, stop)))
                start = stop
        return {name: joined(parts) for name, parts in found.items()}

    def _fit(
        self, batch: _Batch, weights: dict[str, Tensor], second_moment: Tensor, factor: Factor | None
    ) -> LayerFit:
        weight = batch.weight(weights, second_moment)
        fit = fit_layer(
            weight,
            batch.layer.grid,
            group_size=batch.layer.group_size,
            dtype=TORCH_DTYPES[batch.layer.dtype],
            importance=second_moment.diagonal(),
            threads=self.threads,
        )
        if factor is not None:
            fit = compensated(weight, factor, fit, threads=self.threads)
        return fit.compact()

    def _refine(
        self, batch: _Batch, fit: LayerFit, weights: dict[str, Tensor], second_moment: Tensor, order: Tensor
    ) -> LayerFit:
        rounds = self.step.refinements
        if rounds is None:
            rounds = 3 if batch.layer.bits < 4 else 1
        if rounds == 0:
            return fit
        weight = batch.weight(weights, second_moment)
        fit = replace(fit, codes=fit.codes.float())
        return refined(weight, fit, second_moment, order, rounds=rounds, threads=self.threads).compact()

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


def _batches(layers: dict[str, PackedLayer]) -> Iterator[_Batch]:
    """Layers whose weights may be stacked, since all that matters of how they are stored is the same."""
    alike: dict[PackedLayer, list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault(replace(layer, module="", rows=0), []).append(name)
    for names in alike.values():
        parts: list[tuple[str, slice]] = []
        room = limit = max(1, _WEIGHTS_AT_ONCE // layers[names[0]].columns)
        for name in names:
            start, rows = 0, layers[name].rows
            while start < rows:
                stop = min(rows, start + room)
                parts.append((name, slice(start, stop)))
                room, start = room - (stop - start), stop
                if room == 0:
                    yield _Batch(layers[names[0]], tuple(parts))
                    parts, room = [], limit
        if parts:
            yield _Batch(layers[names[0]], tuple(parts))
