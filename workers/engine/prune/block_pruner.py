"""Prune the layers of one block, input by input, and leave it with the weights that a user will run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.errors import JobFailed
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import InputSite, expert_of, gather_moments, reached_sites
from workers.engine.checkpoint.selection import non_finite
from workers.engine.freed_memory import release_freed_memory
from workers.engine.prune.layer_pruner import LayerPruner
from workers.engine.quantize.compensation import row_errors
from workers.engine.quantize.silent_channels import SilentChannels


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

    solver: LayerPruner
    layers: Mapping[str, torch.dtype]
    """The weights by name, and what they are stored in, which may be another dtype than what is computed in."""
    allotted: Mapping[str, float] = field(default_factory=dict)
    """Sparsities of weights by name, where they are not the step's."""
    seed: int = 0

    @torch.no_grad()
    def prune(self, block: LiveBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Prune the chosen layers of a block: what is to be written and reported.

        Raises JobFailed when calibration never reaches one of them.
        """
        chosen, sites = reached_sites(block, self.layers)
        done = PrunedBlock()
        generator = torch.Generator().manual_seed(self.seed + block.index)
        for together in self.rounds(sites):
            gather_moments(block, together)
            for site in together:
                self._prune_site(block, site, {chosen[name]: name for name in site.layers}, generator, done)
        return done.tensors, done.record()

    def rounds(self, sites: list[InputSite]) -> list[list[InputSite]]:
        """The inputs whose statistics are gathered together."""
        return [[site] for site in sites] if self.solver.is_short_of_memory else [sites] if sites else []

    def weights_of(self, block: LiveBlock, layers: dict[str, str]) -> dict[str, Tensor]:
        """Weights (out, in) in the block by their stored names, of which `layers` has the names in the block: views."""
        return {
            name: self.solver.inputs_last(block.module.get_parameter(f"{inside}.weight"))
            for name, inside in layers.items()
        }

    def _sparsities(self, names: Iterable[str]) -> dict[str, float]:
        """How sparse each weight is to be."""
        return {name: self.allotted.get(name, self.solver.step.sparsity) for name in names}

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
        weights = self.weights_of(block, layers)
        _check_finite(weights, second_moment)
        for name, weight in weights.items():
            done.silent.look_at_weight(name, weight)
        done.silent.look_at_inputs(list(weights), second_moment.diagonal())
        sparse = self.solver.solved(
            weights, second_moment, self._sparsities(weights), generator, done.warnings
        )
        for name, weight in weights.items():
            self._settle(name, weight, sparse.pop(name), second_moment, done)
            stored = self.solver.inputs_last(weight).to(self.layers[name])
            done.tensors[name] = stored.cpu().contiguous()
        release_freed_memory()

    def _settle(
        self, name: str, weight: Tensor, sparse: Tensor, second_moment: Tensor, done: PrunedBlock
    ) -> None:
        """Give the block what is left in the place of the weight, and add up what was lost."""
        of_error = of_weights = 0.0
        zeros = 0
        for rows in self.solver.row_parts(weight):
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
