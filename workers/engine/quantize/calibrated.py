"""quantize.calibrated: integer weights chosen by what they do to each layer's outputs, on inputs from calibration text.

Idea: with the second moments H of a layer's inputs, the error of its outputs is tr(ΔW H ΔWᵀ). Scales are searched with
diag H as importance; the columns are rounded one after the other, and what one loses is corrected by those that follow
(GPTQ); then scales and codes are refined together. Blocks are done in order, and each is calibrated on the outputs of
the quantized blocks before it. Memory holds one block, its inputs' statistics and one window's activations.
Papers: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers";
coordinate descent on the codes as in Behdin et al. 2023, "QuantEase".
Left out: matching the outputs of the original rather than of the quantized blocks before (GPTAQ, which measured worse).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.errors import JobFailed
from app.spec.facts import TensorFact
from app.spec.quantize import QuantizeCalibrated
from workers.engine.calibration.block_stream import LiveBlock, stream_blocks
from workers.engine.calibration.input_moments import InputSite, input_moments
from workers.engine.calibration.step_calibration import step_calibration
from workers.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    copy_side_files,
    map_slabs,
    row_slabs,
    write_config,
)
from workers.engine.checkpoint.selection import module_name, non_finite, select_layers
from workers.engine.export.pack_quantized import PackedLayer
from workers.engine.quantize.compensation import output_error
from workers.engine.quantize.layer_solver import LayerSolver
from workers.engine.quantize.packed_layers import (
    WeightError,
    config_with_quantization,
    layer_outcomes,
    plan_layers,
    totals,
    warnings_of,
)
from workers.engine.technique import StepContext, StepOutcome, implements

# Copying embeddings and norms takes little of the time.
_SOLVING = 0.95


@dataclass
class _Solved:
    """What is known of the layers done so far."""

    errors: dict[str, list[WeightError]] = field(default_factory=dict)
    output_errors: list[tuple[float, float]] = field(default_factory=list)
    """Per layer: tr(D H Dᵀ) and tr(W H Wᵀ)."""


@implements(QuantizeCalibrated)
def quantize_calibrated(step: QuantizeCalibrated, context: StepContext) -> StepOutcome:
    """Write `context.target` with all linear layers inside blocks quantized, everything else as it was.

    Raises InvalidRequest when the calibration text is too short, or a weight is not finite; JobFailed when the model's
    activations are not.
    """
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore)
    layers = plan_layers(selection, step)
    facts: list[TensorFact] = []
    for name, entry in checkpoint.tensors.items():
        facts += layers[name].facts() if name in layers else [entry.fact]
    solver = LayerSolver(step, context.threads)
    solved = _Solved()
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:
        blocks = _Blocks(layers, solver, writer, solved)
        with step_calibration(
            context, tokens=step.calibration_tokens, length=step.sequence_length, share=_SOLVING
        ) as calibration:
            stream_blocks(calibration, prepare=blocks.solve)
        _copy_others(checkpoint, layers, writer, context)
    copy_side_files(context.source, context.target)
    write_config(context.target, config_with_quantization(checkpoint, step, selection))
    lost, had = (sum(values) for values in zip(*solved.output_errors, strict=True))
    return StepOutcome(
        layers=layer_outcomes(layers, solved.errors, selection),
        metrics=totals(layers, solved.errors)
        | {
            "relative_output_error": (lost / had) ** 0.5 if had else 0.0,
            "calibration_tokens": int(calibration.windows.numel()),
        },
        warnings=warnings_of(layers, selection) + tuple(solver.warnings),
    )


@dataclass(frozen=True)
class _Blocks:
    """Quantizes block after block and writes what it finds."""

    layers: dict[str, PackedLayer]
    """By the name of the weight."""
    solver: LayerSolver
    writer: CheckpointWriter
    solved: _Solved

    def solve(self, block: LiveBlock) -> None:
        """Quantize the chosen layers of a block, and leave it with the weights that a user will run."""
        chosen = {
            module_name(name): stored for name, stored in block.stored_names.items() if stored in self.layers
        }
        for site in input_moments(block.module, chosen, block.run):
            stored = {name: chosen.pop(name) for name in site.layers}
            self._solve_site(block, site, stored)
        if chosen:
            unseen = ", ".join(chosen.values())
            raise JobFailed(
                f"Calibration never reached {unseen}.",
                code="layer_never_called",
                hint="Put these layers on the step's ignore list, or use quantize.weights.",
            )

    def _solve_site(self, block: LiveBlock, site: InputSite, stored: dict[str, str]) -> None:
        """Quantize the layers that share an input; `stored` are their weights' names by theirs in the block."""
        second_moment = site.second_moment()
        if not torch.isfinite(second_moment).all():
            raise JobFailed(
                f"The inputs of {', '.join(stored.values())} are NaN or infinite on the calibration text.",
                code="non_finite_activations",
                hint="Check that the original gives sensible outputs in float32; quantize.weights needs no activations.",
            )
        weights: dict[str, Tensor] = {}
        for name, weight in stored.items():
            parameter = block.module.get_parameter(f"{name}.weight").float()
            if not torch.isfinite(parameter).all():
                raise non_finite(weight)
            weights[weight] = parameter
        fits = self.solver.solve(weights, {name: self.layers[name] for name in weights}, second_moment)
        for name, weight in stored.items():
            restored = fits[weight].restored()
            self._note(weight, weights[weight], restored, second_moment)
            for tensor, content in self.layers[weight].tensors(fits[weight]).items():
                self.writer.write(tensor, content)
            # What a loader makes of the file, so that the next block is calibrated on what it will be given.
            target = block.module.get_parameter(f"{name}.weight")
            target.copy_(restored.to(fits[weight].dtype))

    def _note(self, name: str, weight: Tensor, restored: Tensor, second_moment: Tensor) -> None:
        difference = restored - weight
        self.solved.errors[name] = [WeightError(_squared_norm(difference), _squared_norm(weight))]
        self.solved.output_errors.append(
            (output_error(difference, second_moment), output_error(weight, second_moment))
        )


def _squared_norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight).double().square())


def _copy_others(
    checkpoint: Checkpoint, layers: dict[str, PackedLayer], writer: CheckpointWriter, context: StepContext
) -> None:
    """Everything that is not quantized, slab by slab."""
    slabs = [
        slab for name, entry in checkpoint.tensors.items() if name not in layers for slab in row_slabs(entry)
    ]
    for _ in map_slabs(
        checkpoint,
        slabs,
        lambda slab, rows: writer.write_rows(slab.entry.name, slab.start, rows),
        threads=context.threads,
        progress=lambda share: context.progress(
            _SOLVING + (1 - _SOLVING) * share, "copying the other weights"
        ),
    ):
        pass
    context.progress(1.0, "done")
