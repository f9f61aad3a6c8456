"""quantize.gptq: integer weights whose rounding errors are made up for, on the inputs that calibration text gives.

Idea: the columns of a weight are rounded one after the other, and what one loses is corrected by those that follow, as
the second moments of the layer's inputs allow. Blocks are done in order, and each is calibrated on the outputs of the
quantized blocks before it. Memory holds one block, its inputs' statistics and one window's activations.
Paper: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
Scales are those of quantize.weights, searched before the first column is rounded; groups keep their place in the row.
Left out: importance in the search of scales, refitting them afterwards, and calibrating anew after each input of a block.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.spec.facts import TensorFact
from app.spec.quantize import QuantizeGptq
from workers.engine.calibration.block_stream import LiveBlock, stream_blocks
from workers.engine.calibration.step_calibration import step_calibration
from workers.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    copy_side_files,
    map_slabs,
    row_slabs,
    write_config,
)
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.checkpoint.selection import non_finite, select_layers
from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.export.pack_quantized import PackedLayer, pack_columns, pack_rows
from workers.engine.quantize.compensation import (
    ColumnGrid,
    Factor,
    compensated_codes,
    output_error,
)
from workers.engine.quantize.grid import Fit, Grid, fit_groups
from workers.engine.quantize.packed_layers import (
    WeightError,
    config_with_quantization,
    layer_outcomes,
    plan_layers,
    totals,
    warnings_of,
)
from workers.engine.quantize.sites import block_sites, factor_of_site
from workers.engine.technique import StepContext, StepOutcome, implements

_CHUNK_WEIGHTS = 2**17
# Copying embeddings and norms takes little of the time.
_SOLVING = 0.95


@dataclass
class _Solved:
    """What is known of the layers done so far."""

    errors: dict[str, list[WeightError]] = field(default_factory=dict)
    output_errors: list[tuple[float, float]] = field(default_factory=list)
    """Per layer: tr(D H Dᵀ) and tr(W H Wᵀ)."""
    warnings: list[str] = field(default_factory=list)


@implements(QuantizeGptq)
def quantize_gptq(step: QuantizeGptq, context: StepContext) -> StepOutcome:
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
    solved = _Solved()
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:
        solver = _Solver(step, layers, writer, solved, context.threads)
        with step_calibration(context, tokens=step.calibration_tokens, share=_SOLVING) as calibration:
            stream_blocks(calibration, prepare=solver.solve_block)
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
        warnings=warnings_of(step, selection) + tuple(solved.warnings),
    )


class _Solver:
    """Quantizes block after block and writes what it finds."""

    def __init__(
        self, step: QuantizeGptq, layers: dict[str, PackedLayer], writer: CheckpointWriter, solved: _Solved,
        threads: int,
    ) -> None:  # fmt: skip
        self.step, self.layers, self.writer, self.solved = step, layers, writer, solved
        self.threads = threads
        self.grid = Grid(step.bits, step.symmetric)

    def solve_block(self, block: LiveBlock) -> None:
        """Quantize the chosen layers of a block, and leave it with the weights that a user will run."""
        for site, stored in block_sites(block, self.layers):
            second_moment = site.second_moment()
            factor = factor_of_site(second_moment, stored, self.step.damping, self.solved.warnings)
            for name, weight in zip(site.layers, stored, strict=True):
                parameter = block.module.get_parameter(f"{name}.weight")
                self._solve_layer(parameter, weight, second_moment, factor)

    def _solve_layer(
        self, parameter: Tensor, stored: str, second_moment: Tensor, factor: Factor | None
    ) -> None:
        if not torch.isfinite(parameter).all():
            raise non_finite(stored)
        fit = _fit(parameter, self.layers[stored], self.grid, self.threads)
        # What multiplies an input that is always zero need not be kept, and would only be compensated for.
        weight = parameter * (second_moment.diagonal() != 0)
        grid = ColumnGrid(fit.scale.float(), fit.zero, fit.group_of, self.grid.half)
        codes = fit.codes if factor is None else compensated_codes(weight, factor, grid, threads=self.threads)
        restored = _restored(codes, fit)
        difference = restored - parameter
        self.solved.errors[stored] = [
            WeightError(float(difference.double().square().sum()), float(parameter.double().square().sum()))
        ]
        self.solved.output_errors.append(
            (output_error(difference, second_moment), output_error(parameter, second_moment))
        )
        _write(self.writer, self.layers[stored], codes, fit)
        # What a loader makes of the file, so that the next block is calibrated on what it will be given.
        parameter.copy_(restored.to(fit.scale.dtype))


@dataclass(frozen=True)
class _LayerFit:
    """Grids of a whole layer: scale and zero point (rows, groups), codes to the nearest (rows, columns)."""

    scale: Tensor
    """In the dtype it is stored in."""
    zero: Tensor
    codes: Tensor
    group_of: Tensor
    """(columns,): the group of each column."""


def _fit(weight: Tensor, layer: PackedLayer, grid: Grid, threads: int) -> _LayerFit:
    """Search scales row by row, in chunks that stay in a core's cache."""
    size = layer.group_size or layer.columns
    chunk = max(1, _CHUNK_WEIGHTS // layer.columns)

    @torch.inference_mode()
    def fit(rows: Tensor) -> Fit:
        return fit_groups(rows.reshape(-1, size), grid, TORCH_DTYPES[layer.dtype], search=True)

    with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(fit, torch.split(weight, chunk)))
    return _LayerFit(
        scale=torch.cat([part.scale for part in parts]).view(-1, layer.groups).to(TORCH_DTYPES[layer.dtype]),
        zero=torch.cat([part.zero for part in parts]).view(-1, layer.groups),
        codes=torch.cat([part.codes for part in parts]).view(-1, layer.columns),
        group_of=torch.arange(layer.columns, device=weight.device) // size,
    )


def _restored(codes: Tensor, fit: _LayerFit) -> Tensor:
    """The weights that codes stand for: (rows, columns), float32."""
    return (codes - fit.zero[:, fit.group_of]) * fit.scale.float()[:, fit.group_of]


def _write(writer: CheckpointWriter, layer: PackedLayer, codes: Tensor, fit: _LayerFit) -> None:
    writer.write(layer.packed.name, pack_rows(codes.to(torch.int8).cpu(), layer.bits))
    writer.write(layer.scale.name, fit.scale.cpu())
    if not layer.symmetric:
        writer.write(layer.zero_point.name, pack_columns(fit.zero.to(torch.int8).cpu(), layer.bits))
    writer.write(layer.shape.name, torch.tensor([layer.rows, layer.columns]))


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
