"""Choose what goes of the weights that share an input, and fit what stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from app.spec.architectures import block_index
from app.spec.prune import PruneCalibrated
from workers.engine.calibration.weight_gradients import WeightGradients
from workers.engine.prune.compensated import refitted, removed_in_order
from workers.engine.prune.criteria import CRITERIA, Criterion, LayerStatistics
from workers.engine.prune.masks import Pattern
from workers.engine.quantize.compensation import Factor, damped, factored_in_place
from workers.engine.quantize.weights_at_once import weights_at_once


@dataclass(frozen=True)
class LayerPruner:
    """Prunes weights as a step says, without changing them."""

    step: PruneCalibrated
    inputs_first: bool
    """Whether weights lie as (in, out)."""
    is_short_of_memory: bool
    """Gather the statistics of one input, prune its layers, go on to the next: less memory, more passes. What follows
    sees what the pruned layers before it in the block give."""
    gradients: WeightGradients | None = None
    """For criteria that need them."""

    def solved(
        self,
        weights: dict[str, Tensor],
        second_moment: Tensor,
        sparsities: Mapping[str, float],
        generator: Generator,
        warnings: list[str],
    ) -> dict[str, Tensor]:
        """Weights (out, in) by name -> the same as sparse as `sparsities` says, fitted; H is (in, in), float32."""
        statistics = LayerStatistics(second_moment.diagonal().clone(), None, generator)
        sparse, damping = self._removed(weights, second_moment, statistics, sparsities, warnings)
        if damping is not None and self.step.fitting_steps:
            with damped(second_moment, damping):
                for name, weight in weights.items():
                    self._fit(weight, sparse[name], second_moment)
        return sparse

    def row_parts(self, weight: Tensor) -> list[slice]:
        """Rows that are worked on at once."""
        at_once = weights_at_once(weight, narrow=self.is_short_of_memory)
        size = max(1, at_once // weight.shape[1])
        return [slice(start, start + size) for start in range(0, len(weight), size)]

    def inputs_last(self, weight: Tensor) -> Tensor:
        """(out, in) of what is stored, or the other way round: a view."""
        return weight.t() if self.inputs_first else weight

    def _removed(
        self,
        weights: dict[str, Tensor],
        second_moment: Tensor,
        statistics: LayerStatistics,
        sparsities: Mapping[str, float],
        warnings: list[str],
    ) -> tuple[dict[str, Tensor], float | None]:
        """The weights without what goes, in their own dtype, by name, and the damping that H needs; None without a factor."""
        step = self.step

        def cut(name: str, factor: Factor | None) -> Tensor:
            gradient = self._gradient(name, weights[name], warnings)
            pattern = Pattern.named(step.pattern, sparsities[name])
            return self._cut(weights[name], pattern, factor, gradient, statistics)

        if not step.compensate and step.criterion != "sparsegpt":
            return {name: cut(name, None) for name in weights}, step.damping
        order = torch.arange(len(second_moment), device=second_moment.device)
        names = ", ".join(weights)
        with factored_in_place(second_moment, self.step.damping, names, warnings, order) as factor:
            if factor is None and step.criterion == "sparsegpt":
                warnings.append(f"chosen by wanda in the place of sparsegpt: {names}")
            found = {name: cut(name, factor) for name in weights}
            return found, None if factor is None else factor.damping

    def _cut(
        self,
        weight: Tensor,
        pattern: Pattern,
        factor: Factor | None,
        gradient: Tensor | None,
        statistics: LayerStatistics,
    ) -> Tensor:
        """A weight (rows, columns) without what goes, some rows at a time."""
        step, cut = self.step, torch.empty_like(weight)
        criterion = self._criterion(factor, gradient)
        if factor is not None:
            statistics = replace(statistics, factor=factor.diagonal())
        for rows in self.row_parts(weight):
            part = weight[rows].float()
            if gradient is not None:
                statistics = replace(statistics, gradient=gradient[rows].float())
            if factor is not None and step.compensate:
                cut[rows] = removed_in_order(part, factor, pattern, criterion, statistics).to(cut.dtype)
            else:
                gone = pattern.lowest(criterion(part, statistics), by_row=True)
                cut[rows] = part.masked_fill(gone, 0).to(cut.dtype)
        return cut

    def _criterion(self, factor: Factor | None, gradient: Tensor | None) -> Criterion:
        """The step's, or Wanda's where what it needs is not there."""
        has_none = self.step.uses_gradients and gradient is None
        if has_none or (self.step.criterion == "sparsegpt" and factor is None):
            return CRITERIA["wanda"]
        return CRITERIA[self.step.criterion]

    def _gradient(self, name: str, weight: Tensor, warnings: list[str]) -> Tensor | None:
        """That of a weight (rows, columns), where the criterion needs it and the loss depends on the weight at all."""
        if self.gradients is None:
            return None
        index = block_index(name)
        if index is None:
            raise ValueError(f"{name} is in no block")
        gradient = self.inputs_last(self.gradients.of_block(index).read(name)).to(weight.device)
        if gradient.any():
            return gradient
        warnings.append(f"chosen by wanda, since the loss does not depend on it: {name}")
        return None

    def _fit(self, weight: Tensor, sparse: Tensor, second_moment: Tensor) -> None:
        """Fit what is left of a weight, in place."""
        for rows in self.row_parts(weight):
            fitted = refitted(
                weight[rows].float(), sparse[rows].float(), second_moment, steps=self.step.fitting_steps
            )
            sparse[rows] = fitted.to(sparse.dtype)
