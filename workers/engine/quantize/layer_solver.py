"""Quantize the layers of one input: the same solver for every grid, whichever algorithm a step asks for.

Rows do not depend on each other. Small layers that are stored alike are stacked, so that a pass over their columns is
made once; large ones are taken some rows at a time, so that what is beside the weights stays small.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.spec.quantize import QuantizeCalibrated
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.freed_memory import release_freed_memory
from workers.engine.quantize.compensation import Factor, compensated, damped, factored_in_place
from workers.engine.quantize.grid import WeightGrid
from workers.engine.quantize.held_zeros import is_pruned
from workers.engine.quantize.layer_fit import LayerFit, joined
from workers.engine.quantize.refinement import descended, refined
from workers.engine.quantize.weights_at_once import weights_at_once


@dataclass(frozen=True)
class _Batch:
    """Rows of layers that are stored alike."""

    layer: StoredLayer
    grid: WeightGrid
    parts: tuple[tuple[str, slice], ...]
    pruned: frozenset[str]
    """Layers whose zeros stay."""

    def weight(self, weights: dict[str, Tensor]) -> Tensor:
        """Its rows, one below the other: (rows, columns), float32."""
        return torch.cat([weights[name][part].float() for name, part in self.parts])

    def held(self, weights: dict[str, Tensor]) -> Tensor | None:
        """Where weights of pruned layers are zero: (rows, columns), bool; None where no layer of it was pruned."""
        if not any(name in self.pruned for name, _ in self.parts):
            return None
        zero = [(weights[name][part] == 0) & (name in self.pruned) for name, part in self.parts]
        return torch.cat(zero)


class LayerSolver:
    """Carries out a step's choices, and keeps what a reader of the report must know."""

    def __init__(self, step: QuantizeCalibrated, threads: int, *, narrow: bool = False) -> None:
        """`narrow`: memory is short."""
        self.step, self.threads, self.narrow = step, threads, narrow
        self.warnings: list[str] = []

    def solve(
        self, weights: dict[str, Tensor], layers: Mapping[str, StoredLayer], second_moment: Tensor
    ) -> dict[str, LayerFit]:
        """Fit weights (rows, columns) that share inputs of second moment H (columns, columns), by name."""
        at_once = weights_at_once(next(iter(weights.values())), narrow=self.narrow)
        batches = list(_batches(weights, layers, at_once))
        importance = second_moment.diagonal().clone()
        if self.step.solver == "nearest":
            fits = [self._fit(batch, weights, importance, None) for batch in batches]
            return _by_layer(batches, fits, layers)
        names = ", ".join(weights)
        with factored_in_place(second_moment, self.step.damping, names, self.warnings) as factor:
            fits = [self._fit(batch, weights, importance, factor) for batch in batches]
        if factor is not None:
            with damped(second_moment, factor.damping):
                fits = [
                    self._refine(batch, fit, weights, second_moment, factor.order)
                    for batch, fit in zip(batches, fits, strict=True)
                ]
        return _by_layer(batches, fits, layers)

    def _fit(
        self, batch: _Batch, weights: dict[str, Tensor], importance: Tensor, factor: Factor | None
    ) -> LayerFit:
        weight = batch.weight(weights)
        fit = batch.layer.nearest(weight, batch.grid, importance=importance, threads=self.threads)
        if factor is not None:
            fit = compensated(weight, factor, replace(fit, held=batch.held(weights)), threads=self.threads)
        return _settled(fit)

    def _refine(
        self, batch: _Batch, fit: LayerFit, weights: dict[str, Tensor], second_moment: Tensor, order: Tensor
    ) -> LayerFit:
        rounds = self.step.refinements
        if rounds is None:
            rounds = 3 if batch.layer.bits < 4 else 1
        if rounds == 0:
            return fit
        weight = batch.weight(weights)
        fit = replace(fit, codes=fit.codes.float(), held=batch.held(weights))
        if not batch.layer.refits_scales:
            for _ in range(rounds):
                fit = descended(weight, fit, second_moment, order, threads=self.threads)
            return _settled(fit)
        return _settled(refined(weight, fit, second_moment, order, rounds=rounds, threads=self.threads))


def _settled(fit: LayerFit) -> LayerFit:
    """What is kept of a batch; what it took beside goes back to the system."""
    kept = fit.compact()
    release_freed_memory()
    return kept


def _by_layer(
    batches: Iterable[_Batch], fits: Iterable[LayerFit], layers: Iterable[str]
) -> dict[str, LayerFit]:
    found: dict[str, list[LayerFit]] = {name: [] for name in layers}
    for batch, fit in zip(batches, fits, strict=True):
        start = 0
        for name, rows in batch.parts:
            stop = start + rows.stop - rows.start
            found[name].append(fit.of_rows(slice(start, stop)))
            start = stop
    return {name: joined(parts) for name, parts in found.items()}


def _batches(
    weights: Mapping[str, Tensor], layers: Mapping[str, StoredLayer], at_once: int
) -> Iterator[_Batch]:
    """Layers whose weights may be stacked, since all that matters of how they are stored is the same."""
    alike: dict[Hashable, list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault(layer.alike, []).append(name)
    pruned = frozenset(name for name, weight in weights.items() if is_pruned(weight))
    for names in alike.values():
        layer = layers[names[0]]
        # Layers that are served as one share their input, and so a scale of the whole.
        grid = layer.grid(
            max(float(weights[name].abs().max()) for name in names) if layer.needs_peak else 0.0
        )
        for parts in _parts([(name, layers[name].rows) for name in names], layer, at_once):
            yield _Batch(layer, grid, tuple(parts), pruned)


def _parts(
    rows_of: list[tuple[str, int]], layer: StoredLayer, at_once: int
) -> Iterator[list[tuple[str, slice]]]:
    """Cut layers of so many rows into lists of a bounded number of weights; blocks of rows are not cut."""
    parts: list[tuple[str, slice]] = []
    most = at_once // layer.columns // layer.block_rows * layer.block_rows
    room = limit = max(layer.block_rows, most)
    for name, rows in rows_of:
        start = 0
        while start < rows:
            stop = min(rows, start + room)
            parts.append((name, slice(start, stop)))
            room, start = room - (stop - start), stop
            if room == 0:
                yield parts
                parts, room = [], limit
    if parts:
        yield parts
