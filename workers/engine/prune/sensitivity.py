"""What the model's loss grows by when one layer alone is pruned, at several sparsities, without running the model again.

With H = Σ x xᵀ / T of a layer's inputs, and g_i = Σ (∂L/∂y_i)² / T of its output i, a change ΔW of the weights costs about
½ Σ_i g_i ΔW_i H ΔW_iᵀ a token: the loss to second order, with Fisher information in the place of its curvature, and inputs,
outputs and tokens taken for independent (Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", sec. 3; Singh and Alistarh 2020, "WoodFisher", sec. 3). ΔW is what the step itself would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.spec.architectures import block_index
from app.spec.prune import SENSITIVITY_SPARSITIES
from app.spec.report import SENSITIVITY
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import gather_moments, reached_sites
from workers.engine.checkpoint.selection import module_name
from workers.engine.prune.block_pruner import BlockPruner
from workers.engine.quantize.compensation import row_errors

Costs = dict[str, list[tuple[float, float]]]
"""Of each weight by name (sparsity, nats a token)."""
Curves = dict[str, tuple[tuple[float, float], ...]]
"""As a report has them."""


@dataclass(frozen=True)
class SensitivityProbe:
    """Looks at block after block."""

    pruner: BlockPruner

    @torch.no_grad()
    def __call__(self, block: LiveBlock, slopes: dict[str, Tensor]) -> dict[str, Any]:
        """For each layer (sparsity, nats a token) at SENSITIVITY_SPARSITIES: slopes are g, (outputs,), by the weights' names."""
        chosen, sites = reached_sites(block, self.pruner.layers)
        costs: Costs = {name: [] for name in chosen.values()}
        for together in self.pruner.rounds(sites):
            gather_moments(block, together)
            for site in together:
                layers = {chosen[name]: name for name in site.layers}
                second_moment = site.second_moment()
                for sparsity in SENSITIVITY_SPARSITIES:
                    block.alive()
                    generator = torch.Generator().manual_seed(self.pruner.seed + block.index)
                    weights = self.pruner.weights_of(block, layers)
                    # What there is to warn of will be said when it is done.
                    sparse = self.pruner.solver.solved(
                        weights, second_moment, dict.fromkeys(weights, sparsity), generator, []
                    )
                    for name, weight in weights.items():
                        errors = row_errors(sparse[name].float() - weight.float(), second_moment)
                        costs[name].append((sparsity, 0.5 * float(errors @ slopes[name])))
        return costs


def merged(blocks: Iterable[dict[str, Any]]) -> Costs:
    """What was found of all blocks, read back from JSON."""
    return {name: [(x, y) for x, y in curve] for block in blocks for name, curve in block.items()}


def curves_of(costs: Costs, allotted: Mapping[str, float], weights: Mapping[str, int]) -> Curves:
    """For the report: each layer's curve, and for each block what it costs at SENSITIVITY_SPARSITIES and what it was allotted."""
    blocks = sorted({block_index(name) or 0 for name in costs})
    curves: Curves = {f"{SENSITIVITY}{module_name(name)}": tuple(curve) for name, curve in costs.items()}
    for number, sparsity in enumerate(SENSITIVITY_SPARSITIES):
        curves[f"block_sensitivity_at_{sparsity:g}"] = tuple(
            (float(index), sum(costs[name][number][1] for name in costs if block_index(name) == index))
            for index in blocks
        )
    curves["block_sparsity"] = tuple(
        (
            float(index),
            sum(allotted[n] * weights[n] for n in costs if block_index(n) == index)
            / sum(weights[n] for n in costs if block_index(n) == index),
        )
        for index in blocks
    )
    return curves
