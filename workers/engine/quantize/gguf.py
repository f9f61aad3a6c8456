"""quantize.gguf: llama.cpp's block formats, with scales searched on the inputs of each layer and compensated rounding.

Idea: llama.cpp's quantizer weighs the error of each weight by the mean square of its input and rounds to nearest. Here
the scales are searched more widely under the same weights; then columns are rounded in order with compensation (Frantar
et al. 2022, GPTQ) on the grid those scales give; then scales and codes are refined in turns on the full second moments.
Blocks are done in order, each calibrated on the outputs of the quantized blocks before it. The file has the formats
and the size that llama.cpp's own has for the same mix.
Left out: importance for embeddings and output head, and choosing formats by sensitivity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.errors import JobFailed, UnsupportedForModel
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES, GGUF_FILE, GgufTensor, gguf_tensors
from app.spec.report import Flag, LayerOutcome
from workers.engine.architectures.loading import architecture_of, load_tokenizer
from workers.engine.calibration.block_stream import LiveBlock, stream_blocks
from workers.engine.calibration.input_moments import gather_moments, reached_sites
from workers.engine.calibration.step_calibration import step_calibration
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.checkpoint import Checkpoint, Slab, copy_side_files, map_slabs, row_slabs
from workers.engine.checkpoint.selection import non_finite, select_layers
from workers.engine.export.gguf.blocks import pack_blocks
from workers.engine.export.gguf.header import encode_header, rope_factors
from workers.engine.export.gguf.reader import check_configuration
from workers.engine.export.gguf.tensors import pack_floats, row_order
from workers.engine.export.gguf.writer import GgufFileWriter
from workers.engine.quantize.compensation import Factor, damped, factor_or_none, output_error
from workers.engine.quantize.gguf_fit import fit_blocks
from workers.engine.quantize.gguf_refinement import Encoded, encode_compensated
from workers.engine.quantize.gguf_scales import GRIDS
from workers.engine.quantize.silent_channels import SilentChannels
from workers.engine.technique import StepContext, StepOutcome, implements

# Embeddings, head and norms take little of the time.
_SOLVING = 0.92


@dataclass
class _Solved:
    """What is known of the layers done so far."""

    layers: dict[str, LayerOutcome] = field(default_factory=dict)
    squares: list[tuple[float, float]] = field(default_factory=list)
    """Per layer: ‖W' − W‖² and ‖W‖²."""
    output_errors: list[tuple[float, float]] = field(default_factory=list)
    """Per layer: tr(D H Dᵀ) and tr(W H Wᵀ)."""
    warnings: list[str] = field(default_factory=list)
    silent: SilentChannels = field(default_factory=SilentChannels)


@implements(QuantizeGguf)
def quantize_gguf(step: QuantizeGguf, context: StepContext) -> StepOutcome:
    """Write `model.gguf` to `context.target`, configuration and tokenizer beside it.

    Raises UnsupportedForModel for what GGUF cannot say of a configuration or a tokenizer, InvalidRequest when the
    calibration text is too short or a weight is not finite; JobFailed when the model's activations are not.
    """
    checkpoint = Checkpoint.open(context.source)
    chosen = select_layers(checkpoint, ()).chosen
    config = _configuration(context)
    tensors = gguf_tensors(checkpoint.facts(), ARCHITECTURES[config.architectures[0]], step.mix)
    _require_blocks(tensors)
    scaling = rope_factors(config)
    written = (*tensors, scaling[0]) if scaling else tensors
    solved = _Solved()
    with step_calibration(context, tokens=step.calibration_tokens, share=_SOLVING) as calibration:
        tokens = int(calibration.windows.numel())
        tokenizer = load_tokenizer(context.source)
        header = encode_header(config, tokenizer, written, step, calibration_tokens=tokens)
        with GgufFileWriter(context.target / GGUF_FILE, header, written) as writer:
            if scaling:
                writer.write_rows(scaling[0].name, 0, pack_floats(scaling[1], scaling[0]))
            check_configuration(context.target / GGUF_FILE, config)
            by_source = {tensor.source: tensor for tensor in tensors}
            solver = _Solver(step, {name: by_source[name] for name in chosen}, writer, config, context)
            stream_blocks(calibration, prepare=lambda block: solver.solve_block(block, solved))
            _write_others(checkpoint, [t for t in tensors if t.source not in chosen], writer, config, context)
    copy_side_files(context.source, context.target)
    context.progress(1.0, "done")
    flags = calibration_flags(context, calibration.windows, tokens=step.calibration_tokens)
    return _outcome(tensors, solved, tokens, flags)


def _require_blocks(tensors: Sequence[GgufTensor]) -> None:
    """Raise UnsupportedForModel for a model so narrow that no block of 32 weights fits into any of its rows."""
    if all(tensor.format.name not in GRIDS for tensor in tensors):
        raise UnsupportedForModel(
            "No layer of the model has inputs that are a multiple of 32: GGUF's blocks fit none of them.",
            code="nothing_to_do",
            hint="Use quantize.weights or quantize.calibrated with one scale per output channel.",
        )


def _configuration(context: StepContext) -> Any:
    """The model's configuration as transformers resolves it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(context.source), local_files_only=True, trust_remote_code=False
    )
    config.architectures = [architecture_of(context.source)]
    return config


class _Solver:
    """Quantizes block after block and writes what it finds."""

    def __init__(
        self, step: QuantizeGguf, layers: dict[str, GgufTensor], writer: GgufFileWriter, config: Any,
        context: StepContext,
    ) -> None:  # fmt: skip
        self.step, self.layers, self.writer, self.config = step, layers, writer, config
        self.threads = context.threads

    def solve_block(self, block: LiveBlock, solved: _Solved) -> None:
        """Quantize the linear layers of a block, and leave it with the weights that a user will run."""
        chosen, sites = reached_sites(
            block,
            self.layers,
            hint="Report this with the model's configuration; quantize.weights needs no calibration.",
        )
        gather_moments(block, sites)
        for site in sites:
            self._solve_site(
                block, site.second_moment(), {name: chosen[name] for name in site.layers}, solved
            )

    def _solve_site(self, block: LiveBlock, moments: Tensor, stored: dict[str, str], solved: _Solved) -> None:
        """Quantize the layers that share an input; `stored` are their weights' names by theirs in the block."""
        names = ", ".join(stored.values())
        if not torch.isfinite(moments).all():
            raise JobFailed(
                f"The inputs of {names} are NaN or infinite on the calibration text.",
                code="non_finite_activations",
                hint="Check that the original gives sensible outputs in float32.",
            )
        solved.silent.look_at_inputs(list(stored.values()), moments.diagonal())
        factor = None
        if self.step.compensate:
            factor = factor_or_none(moments, self.step.damping, names, solved.warnings)
        for name, weight in stored.items():
            parameter = block.module.get_parameter(f"{name}.weight")
            self._solve_layer(parameter, self.layers[weight], moments, factor, solved)

    def _solve_layer(
        self, parameter: Tensor, tensor: GgufTensor, moments: Tensor, factor: Factor | None, solved: _Solved
    ) -> None:
        weight = parameter.float()
        if not torch.isfinite(weight).all():
            raise non_finite(tensor.source)
        solved.silent.look_at_weight(tensor.source, weight)
        if tensor.format.name not in GRIDS:
            restored, data = weight.half().float(), pack_floats(weight, tensor)
        else:
            found = self._encoded(weight, tensor, moments, factor)
            restored = found.weights()
            data = pack_blocks(found.codes.cpu(), found.scales.cpu(), tensor.format.name)
        self.writer.write_rows(tensor.name, 0, data[row_order(tensor, self.config)])
        _note(tensor, weight, restored, moments, solved)
        # What a loader makes of the file, so that the next block is calibrated on what it will be given.
        parameter.copy_(restored)

    def _encoded(
        self, parameter: Tensor, tensor: GgufTensor, moments: Tensor, factor: Factor | None
    ) -> Encoded:
        diagonal = moments.diagonal()
        # What multiplies an input that is always zero need not be kept, and would only be compensated for.
        weight = parameter * (diagonal != 0)
        scales = fit_blocks(weight, diagonal, GRIDS[tensor.format.name], threads=self.threads)
        if factor is None:
            return Encoded(scales.codes(weight), scales)
        # What few tokens say of inputs that always go together is not to be relied on.
        with damped(moments, factor.damping):
            return encode_compensated(weight, scales, factor, moments, threads=self.threads)


def _note(tensor: GgufTensor, weight: Tensor, restored: Tensor, moments: Tensor, solved: _Solved) -> None:
    """Keep what became of a layer for the report."""
    difference = restored - weight
    squares = float(difference.double().square().sum()), float(weight.double().square().sum())
    solved.squares.append(squares)
    solved.output_errors.append((output_error(difference, moments), output_error(weight, moments)))
    plain = tensor.format.name not in GRIDS
    reason = f"its {tensor.shape[1]} inputs are no multiple of 32: stored as {tensor.format.name}"
    solved.layers[tensor.source] = LayerOutcome(
        name=tensor.source,
        action="untouched" if plain else "quantized",
        reason=reason if plain else None,
        parameters=math.prod(tensor.shape),
        bits=None if plain else tensor.format.bits,
        relative_error=None if plain else _root(*squares),
    )


def _write_others(
    checkpoint: Checkpoint, tensors: Sequence[GgufTensor], writer: GgufFileWriter, config: Any,
    context: StepContext,
) -> None:  # fmt: skip
    """Embeddings, head, norms and biases, slab by slab; without importance, for no calibration reaches them."""
    by_source = {tensor.source: tensor for tensor in tensors}
    slabs = [slab for name in by_source for slab in row_slabs(checkpoint.tensors[name])]

    def work(slab: Slab, rows: Tensor) -> None:
        tensor, values = by_source[slab.entry.name], rows.float()
        if not torch.isfinite(values).all():
            raise non_finite(tensor.source)
        if tensor.format.name not in GRIDS:
            data = pack_floats(values, tensor, shifted=_is_shifted(tensor, config))
        else:
            scales = fit_blocks(values, torch.ones(values.shape[1]), GRIDS[tensor.format.name])
            data = pack_blocks(scales.codes(values), scales, tensor.format.name)
        writer.write_rows(tensor.name, slab.start, data)

    def progress(share: float) -> None:
        context.progress(_SOLVING + (1 - _SOLVING) * 0.99 * share, "writing embeddings and norms")

    for _ in map_slabs(checkpoint, slabs, work, threads=context.threads, progress=progress):
        pass


def _is_shifted(tensor: GgufTensor, config: Any) -> bool:
    """Gemma multiplies by one plus the norm's weight; GGUF stores what is multiplied by."""
    return bool(config.architectures[0].startswith("Gemma")) and tensor.name.endswith("norm.weight")


def _outcome(
    tensors: Sequence[GgufTensor], solved: _Solved, tokens: int, flags: tuple[Flag, ...]
) -> StepOutcome:
    quantized = [t for t in tensors if t.format.name in GRIDS]
    weights = sum(math.prod(t.shape) for t in quantized)
    lost, had = (sum(values) for values in zip(*solved.output_errors, strict=True))
    error, norm = (sum(values) for values in zip(*solved.squares, strict=True))
    formats = sorted({t.format.name for t in quantized})
    return StepOutcome(
        layers=tuple(solved.layers.values()),
        metrics={
            "quantized_weights": weights,
            "stored_bits": 8 * sum(t.nbytes for t in quantized) / weights,
            "relative_error": _root(error, norm),
            "relative_output_error": _root(lost, had),
            "calibration_tokens": tokens,
            "formats": ", ".join(formats),
        },
        warnings=tuple(solved.warnings),
        flags=(*flags, *solved.silent.flags(dead_weights="Their weights became zero.")),
    )


def _root(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
