"""Quantize the layers of one block, site by site, and leave it with the weights that a user will run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.errors import JobFailed
from app.spec.quantize import QuantizeCalibrated
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import InputSite, expert_of, gather_moments, input_sites
from workers.engine.checkpoint.selection import module_name, non_finite
from workers.engine.export.pack_quantized import PackedLayer
from workers.engine.quantize.compensation import row_errors
from workers.engine.quantize.layer_fit import LayerFit
from workers.engine.quantize.layer_solver import LayerSolver

_ROWS_AT_ONCE = 1024


@dataclass
class SolvedBlock:
    """What became of a block."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What is to be written, by name."""
    weight_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By weight: ‖D‖² and ‖W‖², D what was changed."""
    outputs_lost: float = 0.0
    """Sum over the layers of tr(D H Dᵀ)."""
    outputs_had: float = 0.0
    """The same of tr(W H Wᵀ)."""
    warnings: list[str] = field(default_factory=list)
    seldom_used: dict[str, int] = field(default_factory=dict)
    """Tokens seen by the experts that saw too few."""

    def record(self) -> dict[str, Any]:
        """What is to be reported, fit for JSON."""
        return {
            "weight_errors": self.weight_errors,
            "outputs_lost": self.outputs_lost,
            "outputs_had": self.outputs_had,
            "warnings": self.warnings,
            "seldom_used": self.seldom_used,
        }


@dataclass(frozen=True)
class BlockSolver:
    """Quantizes block after block."""

    step: QuantizeCalibrated
    layers: dict[str, PackedLayer]
    """By the name of the weight."""
    threads: int
    one_site_at_a_time: bool
    """Gather the statistics of one input, solve its layers, go on to the next: less memory, more passes. What follows
    sees what the quantized layers before it in the block give."""

    def solve(self, block: LiveBlock) -> SolvedBlock:
        """Quantize the chosen layers of a block. Raises JobFailed when calibration never reaches one of them."""
        chosen = {
            module_name(name): stored for name, stored in block.stored_names.items() if stored in self.layers
        }
        done = SolvedBlock()
        if not chosen:
            return done
        solver = LayerSolver(self.step, self.threads)
        sites = input_sites(block, list(chosen))
        unseen = chosen.keys() - {layer for site in sites for layer in site.layers}
        if unseen:
            raise JobFailed(
                f"Calibration never reached {', '.join(sorted(chosen[name] for name in unseen))}.",
                code="layer_never_called",
                hint="Put these layers on the step's ignore list, or use quantize.weights.",
            )
        for together in [[site] for site in sites] if self.one_site_at_a_time else [sites]:
            gather_moments(block, together)
            for site in together:
                self._solve_site(block, site, {name: chosen[name] for name in site.layers}, solver, done)
        done.warnings += solver.warnings
        return done

    def _solve_site(
        self,
        block: LiveBlock,
        site: InputSite,
        stored: dict[str, str],
        solver: LayerSolver,
        done: SolvedBlock,
    ) -> None:
        """Quantize the layers that share an input; `stored` are their weights' names by theirs in the block."""
        if site.is_guess:
            done.seldom_used |= {expert_of(name): site.tokens for name in stored.values()}
        second_moment = site.second_moment()
        if not torch.isfinite(second_moment.diagonal()).all():
            raise JobFailed(
                f"The inputs of {', '.join(stored.values())} are NaN or infinite on the calibration text.",
                code="non_finite_activations",
                hint="Check that the original gives sensible outputs in float32; quantize.weights needs no activations.",
            )
        weights: dict[str, Tensor] = {
            weight: block.module.get_parameter(f"{name}.weight") for name, weight in stored.items()
        }
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise non_finite(name)
        fits = solver.solve(weights, {name: self.layers[name] for name in weights}, second_moment)
        for name, fit in fits.items():
            self._settle(name, weights[name], fit, second_moment, done)
            done.tensors |= self.layers[name].tensors(fit)

    def _settle(
        self, name: str, weight: Tensor, fit: LayerFit, second_moment: Tensor, done: SolvedBlock
    ) -> None:
        """Give the block the weights that a loader makes of the file, and add up what was lost; few rows at a time."""
        of_error = of_weights = 0.0
        for start in range(0, len(weight), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            before = weight[rows].to(torch.float32, copy=True)
            restored = fit.of_rows(rows).restored()
            # The next layers and blocks are calibrated on what they will be given.
            weight[rows] = restored.to(fit.dtype).to(weight.dtype)
            difference = restored.sub_(before)
            of_error += _total(difference.square())
            of_weights += _total(before.square())
            done.outputs_lost += _total(row_errors(difference, second_moment))
            done.outputs_had += _total(row_errors(before, second_moment))
        done.weight_errors[name] = (of_error, of_weights)


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
