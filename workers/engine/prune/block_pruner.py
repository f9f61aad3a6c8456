"""Prune the layers of one block, input by input, and leave it with the weights that a user will run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from app.errors import JobFailed
from app.spec.architectures import block_index
from app.spec.prune import PruneCalibrated
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import InputSite, expert_of, gather_moments, reached_sites
from workers.engine.calibration.weight_gradients import WeightGradients
from workers.engine.checkpoint.selection import non_finite
from workers.engine.freed_memory import release_freed_memory
from workers.engine.prune.compensated import refitted, removed_in_order
from workers.engine.prune.criteria import CRITERIA, Criterion, LayerStatistics
from workers.engine.prune.masks import Pattern
from workers.engine.quantize.compensation import Factor, damped, factored_in_place, row_errors
from workers.engine.quantize.silent_channels import SilentChannels
from workers.engine.quantize.weights_at_once import weights_at_once


@dataclass
class PrunedBlock:
    """What became of a block."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Pruned weights as they are stored, by name."""
    zeros: dict[str, int] = field(default_factory=dict)
    weight_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By weight: ‖D‖² and ‖W‖², D what was changed."""
    outputs_lost: float = 0.0
    """Sum over the layers of tr(D H Dᵀ)."""
    outputs_had: float = 0.0
    """The same of tr(W H Wᵀ)."""
    warnings: list[str] = field(default_factory=list)
    seldom_used: dict[str, int] = field(default_factory=dict)
    """Tokens seen by the experts that saw too few."""
    silent: SilentChannels = field(default_factory=SilentChannels)

    def record(self) -> dict[str, Any]:
        """What is to be reported, fit for JSON."""
        return {
            "zeros": self.zeros,
            "weight_errors": self.weight_errors,
            "outputs_lost": self.outputs_lost,
            "outputs_had": self.outputs_had,
            "warnings": self.warnings,
            "seldom_used": self.seldom_used,
            "zero_outputs": self.silent.zero_outputs,
            "dead_inputs": self.silent.dead_inputs,
        }


@dataclass(frozen=True)
class BlockPruner:
    """Prunes block after block."""

    step: PruneCalibrated
    layers: Mapping[str, torch.dtype]
    """The weights by name, and what they are stored in, which may be another dtype than what is computed in."""
    inputs_first: bool
    """Whether weights lie as (in, out)."""
    one_site_at_a_time: bool
    """Gather the statistics of one input, prune its layers, go on to the next: less memory, more passes. What follows
    sees what the pruned layers before it in the block give."""
    gradients: WeightGradients | None = None
    """For criteria that need them."""
    seed: int = 0

    @torch.no_grad()
    def prune(self, block: LiveBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Prune the chosen layers of a block: what is to be written and reported.

        Raises JobFailed when calibration never reaches one of them.
        """
        chosen, sites = reached_sites(block, self.layers)
        done = PrunedBlock()
        generator = torch.Generator().manual_seed(self.seed + block.index)
        for together in [[site] for site in sites] if self.one_site_at_a_time else [sites] if sites else []:
            gather_moments(block, together)
            for site in together:
                self._prune_site(block, site, {chosen[name]: name for name in site.layers}, generator, done)
        return done.tensors, done.record()

    def _prune_site(
        self,
        block: LiveBlock,
        site: InputSite,
        layers: dict[str, str],
        generator: torch.Generator,
        done: PrunedBlock,
    ) -> None:
        """Prune the layers that share an input; `layers` are their names in the block by their weights' names."""
        if site.is_guess:
            done.seldom_used |= {expert_of(name): site.tokens for name in layers}
        second_moment = site.second_moment()
        weights = {
            name: self._inputs_last(block.module.get_parameter(f"{inside}.weight"))
            for name, inside in layers.items()
        }
        _check_finite(weights, second_moment)
        for name, weight in weights.items():
            done.silent.look_at_weight(name, weight)
        done.silent.look_at_inputs(list(weights), second_moment.diagonal())
        statistics = LayerStatistics(second_moment.diagonal().clone(), None, generator)
        sparse, damping = self._removed(weights, second_moment, statistics, done)
        if damping is not None and self.step.fitting_steps:
            with damped(second_moment, damping):
                for name, weight in weights.items():
                    self._fit(weight, sparse[name], second_moment)
        for name, weight in weights.items():
            self._settle(name, weight, sparse.pop(name), second_moment, done)
            stored = self._inputs_last(weight).to(self.layers[name])
            done.tensors[name] = stored.cpu().contiguous()
        release_freed_memory()

    def _removed(
        self,
        weights: dict[str, Tensor],
        second_moment: Tensor,
        statistics: LayerStatistics,
        done: PrunedBlock,
    ) -> tuple[dict[str, Tensor], float | None]:
        """The weights without what goes, in their own dtype, by name, and the damping that H needs; None without a factor."""
        step = self.step
        if not step.compensate and step.criterion != "sparsegpt":
            cut = {name: self._cut(name, weight, None, statistics, done) for name, weight in weights.items()}
            return cut, step.damping
        order = torch.arange(len(second_moment), device=second_moment.device)
        names = ", ".join(weights)
        with factored_in_place(second_moment, self.step.damping, names, done.warnings, order) as factor:
            if factor is None and step.criterion == "sparsegpt":
                done.warnings.append(f"chosen by wanda in the place of sparsegpt: {names}")
            cut = {
                name: self._cut(name, weight, factor, statistics, done) for name, weight in weights.items()
            }
            return cut, None if factor is None else factor.damping

    def _cut(
        self,
        name: str,
        weight: Tensor,
        factor: Factor | None,
        statistics: LayerStatistics,
        done: PrunedBlock,
    ) -> Tensor:
        """A weight (rows, columns) without what goes, some rows at a time."""
        step, cut = self.step, torch.empty_like(weight)
        pattern = Pattern.named(step.pattern, step.sparsity)
        gradient = self._gradient(name, weight, done)
        criterion = self._criterion(factor, gradient)
        if factor is not None:
            statistics = replace(statistics, factor=factor.diagonal())
        for rows in self._row_parts(weight):
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

    def _gradient(self, name: str, weight: Tensor, done: PrunedBlock) -> Tensor | None:
        """That of a weight (rows, columns), where the criterion needs it and the loss depends on the weight at all."""
        if self.gradients is None:
            return None
        index = block_index(name)
        if index is None:
            raise ValueError(f"{name} is in no block")
        gradient = self._inputs_last(self.gradients.of_block(index).read(name)).to(weight.device)
        if gradient.any():
            return gradient
        done.warnings.append(f"chosen by wanda, since the loss does not depend on it: {name}")
        return None

    def _fit(self, weight: Tensor, sparse: Tensor, second_moment: Tensor) -> None:
        """Fit what is left of a weight, in place."""
        for rows in self._row_parts(weight):
            fitted = refitted(
                weight[rows].float(), sparse[rows].float(), second_moment, steps=self.step.fitting_steps
            )
            sparse[rows] = fitted.to(sparse.dtype)

    def _settle(
        self, name: str, weight: Tensor, sparse: Tensor, second_moment: Tensor, done: PrunedBlock
    ) -> None:
        """Give the block what is left in the place of the weight, and add up what was lost."""
        of_error = of_weights = 0.0
        zeros = 0
        for rows in self._row_parts(weight):
            before = weight[rows].to(torch.float32, copy=True)
            # The next layers and blocks are calibrated on what they will be given.
            weight[rows] = sparse[rows].to(self.layers[name]).to(weight.dtype)
            zeros += int((weight[rows] == 0).sum())
            difference = weight[rows].float() - before
            of_error += _total(difference.square())
            of_weights += _total(before.square())
            # For the report alone: the three digits of the weights' own dtype are plenty.
            done.outputs_lost += _total(row_errors(difference.to(weight.dtype), second_moment))
            done.outputs_had += _total(row_errors(before.to(weight.dtype), second_moment))
        done.weight_errors[name] = (of_error, of_weights)
        done.zeros[name] = zeros

    def _row_parts(self, weight: Tensor) -> list[slice]:
        at_once = weights_at_once(weight, narrow=self.one_site_at_a_time)
        size = max(1, at_once // weight.shape[1])
        return [slice(start, start + size) for start in range(0, len(weight), size)]

    def _inputs_last(self, weight: Tensor) -> Tensor:
        """(out, in) of what is stored, or the other way round: a view."""
        return weight.t() if self.inputs_first else weight


def _check_finite(weights: dict[str, Tensor], second_moment: Tensor) -> None:
    """Raise JobFailed for inputs that are not finite, InvalidRequest for such a weight."""
    if not torch.isfinite(second_moment.diagonal()).all():
        raise JobFailed(
            f"The inputs of {', '.join(weights)} are NaN or infinite on the calibration text.",
            code="non_finite_activations",
            hint="Check that the original gives sensible outputs in float32; prune.magnitude needs no activations.",
        )
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise non_finite(name)


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
