"""Quantize the layers of one block, site by site, and leave it with the weights that a user will run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.errors import JobFailed
from app.spec.quantize import QuantizeCalibrated
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.hidden_states import HiddenStates
from workers.engine.calibration.input_moments import InputSite, expert_of, gather_moments, reached_sites
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.checkpoint.selection import non_finite
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.freed_memory import release_freed_memory
from workers.engine.quantize.block_tuning import Untuned, original_outputs, row_parts, tune_block
from workers.engine.quantize.channel_scaling import scale_channels
from workers.engine.quantize.compensation import row_errors
from workers.engine.quantize.layer_fit import LayerFit
from workers.engine.quantize.layer_solver import LayerSolver
from workers.engine.quantize.sign_rounding import best_alone, doubts
from workers.engine.quantize.silent_channels import SilentChannels
from workers.engine.quantize.site_solving import SiteProblem, SiteSolution, solve_at_once
from workers.engine.quantize.weights_at_once import weights_at_once

# Of a layer, while what was lost is added up.
_WEIGHTS_AT_ONCE = 2**22


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
    silent: SilentChannels = field(default_factory=SilentChannels)
    tuning: tuple[float, float] | None = None
    """Mean squared error of the block's outputs before and after it was tuned."""
    untuned: dict[str, Untuned] = field(default_factory=dict)
    """The layers by their names in the block, while they wait to be tuned."""

    def record(self) -> dict[str, Any]:
        """What is to be reported, fit for JSON."""
        return {
            "weight_errors": self.weight_errors,
            "outputs_lost": self.outputs_lost,
            "outputs_had": self.outputs_had,
            "warnings": self.warnings,
            "seldom_used": self.seldom_used,
            "zero_outputs": self.silent.zero_outputs,
            "dead_inputs": self.silent.dead_inputs,
            "tuning": self.tuning,
        }


@dataclass(frozen=True)
class BlockSolver:
    """Quantizes block after block."""

    step: QuantizeCalibrated
    layers: dict[str, StoredLayer]
    """By the name of the weight."""
    threads: int
    one_site_at_a_time: bool
    """Gather the statistics of one input, solve its layers, go on to the next: less memory, more passes. What follows
    sees what the quantized layers before it in the block give."""
    seed: int = 0

    def solve(self, block: LiveBlock) -> SolvedBlock:
        """Quantize the chosen layers of a block. Raises JobFailed when calibration never reaches one of them."""
        if self.step.solver != "signround":
            return self._scale_and_solve(block)
        with original_outputs(block) as originals:
            done = self._scale_and_solve(block)
            if done.untuned:
                self._tune(block, originals, done)
        return done

    def _scale_and_solve(self, block: LiveBlock) -> SolvedBlock:
        if self.step.scaling == "none":
            return self._solve_layers(block)
        scaled = scale_channels(block, self.step, self.layers, threads=self.threads)
        done = self._solve_layers(block)
        done.tensors = scaled.tensors | done.tensors
        done.warnings += scaled.warnings
        return done

    def _tune(self, block: LiveBlock, originals: HiddenStates, done: SolvedBlock) -> None:
        layers, done.untuned = done.untuned, {}
        tuned = tune_block(
            block, originals, layers, steps=self.step.tuning_steps, seed=self.seed + block.index
        )
        done.tuning = tuned.error_before, tuned.error_after
        for name, fit in tuned.fits.items():
            stored = block.stored_names[f"{name}.weight"]
            done.tensors |= {key: rows for key, (_, rows) in self.layers[stored].parts(fit, 0).items()}
            done.weight_errors[stored] = _weight_error(layers[name].original, fit)

    def _solve_layers(self, block: LiveBlock) -> SolvedBlock:
        chosen, sites = reached_sites(block, self.layers)
        done = SolvedBlock()
        if not chosen:
            return done
        warnings: list[str] = []
        for together in [[site] for site in sites] if self.one_site_at_a_time else [sites]:
            gather_moments(block, together)
            release_freed_memory()
            stored = [{name: chosen[name] for name in site.layers} for site in together]
            if len(block.devices) == 1:
                for site, names in zip(together, stored, strict=True):
                    warnings += self._solve_site(block, site, names, done)
                continue
            problems = [self._problem(block, *given, done) for given in zip(together, stored, strict=True)]
            solutions = solve_at_once(problems, self._solution, block.devices)
            for problem, solution in zip(problems, solutions, strict=True):
                self._use(block, problem, solution.fits, done)
                warnings += solution.warnings
        if self.step.bias_correction and not any(f"{name}.bias" in block.stored_names for name in chosen):
            done.warnings.append(f"no bias to correct in block {block.index}")
        done.warnings += warnings
        return done

    def _solve_site(
        self, block: LiveBlock, site: InputSite, stored: dict[str, str], done: SolvedBlock
    ) -> list[str]:
        """Quantize the layers that share an input, whose statistics are forgotten then. Returns warnings."""
        problem = self._problem(block, site, stored, done)
        solution = self._solution(problem)
        self._use(block, problem, solution.fits, done)
        return solution.warnings

    def _solution(self, problem: SiteProblem) -> SiteSolution:
        solver = LayerSolver(self.step, self.threads, narrow=self.one_site_at_a_time)
        layers = {name: self.layers[name] for name in problem.weights}
        fits = solver.solve(problem.weights, layers, problem.second_moment)
        return SiteSolution(fits, solver.warnings)

    def _problem(
        self, block: LiveBlock, site: InputSite, stored: dict[str, str], done: SolvedBlock
    ) -> SiteProblem:
        """What is to be solved for an input; `stored` are its layers' weights' names by theirs in the block."""
        if site.is_guess:
            done.seldom_used |= {expert_of(name): site.tokens for name in stored.values()}
        mean = site.mean()
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
            done.silent.look_at_weight(name, weight)
        done.silent.look_at_inputs(list(weights), second_moment.diagonal())
        return SiteProblem(stored, weights, second_moment, mean, site.peak())

    def _use(
        self, block: LiveBlock, problem: SiteProblem, fits: dict[str, LayerFit], done: SolvedBlock
    ) -> None:
        """Give the block what was found, and keep it."""
        weights = problem.weights
        if self.step.bias_correction:
            self._correct_biases(block, problem.stored, weights, fits, problem.mean, done)
        for within, name in problem.stored.items():
            if self.step.solver == "signround":
                done.untuned[within] = _untuned(weights[name], fits[name], problem.second_moment)
            self._settle(name, weights[name], fits[name], problem.second_moment, done)
            done.tensors |= self.layers[name].tensors(fits[name], problem.input_peak)
        release_freed_memory()

    def _correct_biases(
        self,
        block: LiveBlock,
        stored: dict[str, str],
        weights: dict[str, Tensor],
        fits: dict[str, LayerFit],
        mean: Tensor,
        done: SolvedBlock,
    ) -> None:
        """Add to biases what the outputs lose on average, (W − Ŵ)·E[x] (Nagel et al. 2019, sec. 4.2, eq. 15)."""
        for name, weight in stored.items():
            if (key := block.stored_names.get(f"{name}.bias")) is None:
                continue
            bias = block.module.get_parameter(f"{name}.bias")
            corrected = bias.float() + (weights[weight].float() - fits[weight].restored()) @ mean
            done.tensors[key] = corrected.to(TORCH_DTYPES[self.layers[weight].dtype]).cpu()
            bias.copy_(done.tensors[key])

    def _settle(
        self, name: str, weight: Tensor, fit: LayerFit, second_moment: Tensor, done: SolvedBlock
    ) -> None:
        """Give the block the weights that a loader makes of the file, and add up what was lost; few rows at a time."""
        of_error = of_weights = 0.0
        size = max(1, _settled_at_once(weight) // weight.shape[1])
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            before = weight[rows].to(torch.float32, copy=True)
            restored = fit.of_rows(rows).restored()
            # The next layers and blocks are calibrated on what they will be given.
            weight[rows] = restored.to(fit.dtype).to(weight.dtype)
            difference = restored.sub_(before)
            of_error += _total(difference.square())
            of_weights += _total(before.square())
            # For the report alone: the three digits of the weights' own dtype are plenty.
            done.outputs_lost += _total(row_errors(difference.to(weight.dtype), second_moment))
            done.outputs_had += _total(row_errors(before.to(weight.dtype), second_moment))
        done.weight_errors[name] = (of_error, of_weights)


def _settled_at_once(weight: Tensor) -> int:
    return _WEIGHTS_AT_ONCE if weight.device.type == "cpu" else weights_at_once(weight, narrow=True)


def _untuned(weight: Tensor, fit: LayerFit, second_moment: Tensor) -> Untuned:
    latent = torch.empty(weight.shape, device=weight.device)
    for rows in row_parts(len(weight)):
        part = fit.of_rows(rows)
        wanted = best_alone(weight[rows].float(), part.restored(), second_moment)
        latent[rows] = doubts(part, wanted).add_(part.codes)
    return Untuned(fit, latent, weight.clone())


def _weight_error(weight: Tensor, fit: LayerFit) -> tuple[float, float]:
    """‖D‖² and ‖W‖²."""
    of_error = of_weights = 0.0
    for rows in row_parts(len(weight)):
        before = weight[rows].float()
        of_error += _total((fit.of_rows(rows).restored() - before).square())
        of_weights += _total(before.square())
    return of_error, of_weights


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
