"""quantize.dynamic: what torch.ao.quantization.quantize_dynamic does to linear layers, without loading the model.

Idea: 8-bit integers with one scale for the whole weight; inputs get theirs as they come, in PyTorch's own kernels
(https://docs.pytorch.org/docs/stable/quantization.html, "dynamic quantization"). Two passes over the weights: the first
finds the largest, the second rounds, slab by slab, so memory does not grow with the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import UnsupportedForModel
from app.spec.architectures import architecture_in
from app.spec.layouts import limits_of_layout
from app.spec.quantize_dynamic import CODES, SCALE, QuantizeDynamic, head_source, stored_layer, tensors_after
from app.spec.report import LayerOutcome
from workers.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Slab,
    copy_side_files,
    map_slabs,
    row_slabs,
    write_config,
)
from workers.engine.checkpoint.selection import Selection, module_name, select_layers
from workers.engine.export.dynamic_int8 import declaration, encode, scale_for
from workers.engine.quantize.largest_weights import largest_weights
from workers.engine.quantize.packed_layers import WeightError, relative_error
from workers.engine.technique import StepContext, StepOutcome, implements

# The first pass only reads.
_LOOKING = 0.3
# Of 16-bit weights a thread holds several float32 copies.
_SLAB_BYTES = 2**20


@dataclass(frozen=True)
class _Plan:
    """What becomes of which tensor."""

    modules: dict[str, str]
    """Modules to quantize by the weight that they are quantized from."""
    kept: frozenset[str]
    """Tensors that are written as they are; with a tied head the embeddings are among both."""
    selection: Selection
    untied: bool
    """Whether the head was one tensor with the embeddings."""


@implements(QuantizeDynamic)
def quantize_dynamic(step: QuantizeDynamic, context: StepContext) -> StepOutcome:
    """Write `context.target` with codes and one scale for each linear layer inside blocks, the rest as it was."""
    checkpoint = Checkpoint.open(context.source)
    plan = _plan(step, checkpoint)
    scales = _scales(checkpoint, plan, context)
    slabs = [slab for entry in checkpoint.tensors.values() for slab in row_slabs(entry, _SLAB_BYTES)]
    facts = list(tensors_after(step, tuple(checkpoint.facts()), architecture_in(checkpoint.config)))
    errors: dict[str, list[WeightError]] = {name: [] for name in plan.modules}
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:

        def work(slab: Slab, rows: Tensor) -> WeightError:
            name = slab.entry.name
            if name in plan.kept:
                writer.write_rows(name, slab.start, rows)
            if name not in plan.modules:
                return WeightError()
            return _write_codes(writer, plan.modules[name], slab, rows, scales[name])

        def progress(share: float) -> None:
            context.progress(_LOOKING + (1 - _LOOKING) * share, "rounding to int8")

        for slab, error in map_slabs(checkpoint, slabs, work, threads=context.threads, progress=progress):
            if slab.entry.name in errors:
                errors[slab.entry.name].append(error)
    copy_side_files(context.source, context.target)
    write_config(context.target, _config(step, checkpoint))
    return _outcome(plan, checkpoint, errors)


def _plan(step: QuantizeDynamic, checkpoint: Checkpoint) -> _Plan:
    """Raises UnsupportedForModel where layers are no nn.Linear, or the model is quantized already."""
    architecture = architecture_in(checkpoint.config)
    for _, why in limits_of_layout(step, architecture, ()):
        raise UnsupportedForModel(why, hint="Submitting the job anew says the same before it starts.")
    selection = select_layers(checkpoint, step.ignore)
    modules = {name: module_name(name) for name in selection.chosen}
    kept = frozenset(checkpoint.tensors) - modules.keys()
    head = head_source(checkpoint.facts(), architecture) if step.include_head else None
    if step.include_head and head is None:
        raise UnsupportedForModel(
            f"{architecture.name} has no language-model head among its weights.",
            hint="Leave include_head out.",
        )
    if head is not None:
        modules[head.name] = module_name(architecture.head)
    untied = head is not None and head.name != architecture.head
    return _Plan(modules, kept - {architecture.head} if head is not None else kept, selection, untied)


def _scales(checkpoint: Checkpoint, plan: _Plan, context: StepContext) -> dict[str, Tensor]:
    """The scale of each weight by its name: float32, without dimensions."""
    peaks = largest_weights(
        checkpoint,
        plan.modules,
        slab_bytes=_SLAB_BYTES,
        threads=context.threads,
        progress=lambda share: context.progress(_LOOKING * share, "looking for the largest weights"),
    )
    return {name: scale_for(torch.tensor(peak)) for name, peak in peaks.items()}


def _write_codes(
    writer: CheckpointWriter, module: str, slab: Slab, rows: Tensor, scale: Tensor
) -> WeightError:
    weight = rows.float()
    codes = encode(weight, scale)
    writer.write_rows(f"{module}.{CODES}", slab.start, codes)
    if slab.start == 0:
        writer.write(f"{module}.{SCALE}", scale.reshape(1))
    error = codes.float().mul_(scale).sub_(weight)
    return WeightError(*(t.square().sum(dtype=torch.float64).item() for t in (error, weight)))


def _config(step: QuantizeDynamic, checkpoint: Checkpoint) -> dict[str, object]:
    tied = {"tie_word_embeddings": False} if step.include_head else {}
    return checkpoint.config | tied | {"quantization_config": declaration()}


def _outcome(plan: _Plan, checkpoint: Checkpoint, errors: dict[str, list[WeightError]]) -> StepOutcome:
    outcomes = []
    for name, entry in plan.selection.chosen.items():
        stored = sum(8 * fact.nbytes for fact in stored_layer("", entry.shape))
        outcomes.append(
            LayerOutcome(
                name=name,
                action="quantized",
                parameters=entry.fact.elements,
                bits=stored / entry.fact.elements,
                relative_error=relative_error(errors[name]),
            )
        )
    weights = sum(checkpoint.tensors[name].fact.elements for name in plan.modules)
    metrics: dict[str, float | int | str | None] = {
        "quantized_weights": weights,
        "stored_bits": 8 + 32 * len(plan.modules) / weights,
        "relative_error": relative_error([error for parts in errors.values() for error in parts]),
    }
    return StepOutcome(
        layers=(*outcomes, *plan.selection.untouched),
        metrics=metrics,
        warnings=_warnings(plan),
    )


def _warnings(plan: _Plan) -> tuple[str, ...]:
    loading = (
        "runs on CPUs with PyTorch, whose dynamic int8 is deprecated, and is loaded by load_dynamic_int8 in "
        "docs/techniques.md; plain from_pretrained refuses it"
    )
    apart = "the head was one tensor with the embeddings: they are stored apart now, the head in int8"
    return (*plan.selection.warnings, loading, *((apart,) if plan.untied else ()))
