"""quantize.onnx: an ONNX graph whose linear layers inside blocks are all quantized, calibrated block by block.

First the weights are solved from the checkpoint, one block in memory at a time (`matmul_nbits.py`, `qdq.py`), each block
calibrated on the quantized ones before it. Then the model is loaded and exported in float32, and every product with a
solved weight is replaced by nodes of our own, whatever form it was exported in: onnxruntime's quantizers look for MatMul
with a plain weight and pass over what they do not know. The written file is read again, and a layer that is not
quantized there, and was not to be left, fails the job.

Image classifiers go a way of their own: onnx_images.py.

Left out: 16-bit scales and activations, a key-value cache, and timing the result: the evaluation of the job does that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch

from app.errors import JobFailed
from app.spec.architectures import block_index
from app.spec.base import Family
from app.spec.quantize_onnx import QuantizeOnnx
from workers.engine.architectures.loading import architecture_of, load_model
from workers.engine.calibration.block_stream import stream_blocks
from workers.engine.calibration.step_calibration import step_calibration
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.checkpoint.reader import Checkpoint
from workers.engine.checkpoint.selection import Selection, select_layers
from workers.engine.checkpoint.side_files import copy_side_files
from workers.engine.export.onnx import MODEL_FILE, check_graph, export_graph, publish_graph, save_graph
from workers.engine.export.onnx_coverage import check_coverage
from workers.engine.export.onnx_graph import linear_nodes, remove_unused, token_embedding
from workers.engine.export.onnx_int8 import quantize_embedding
from workers.engine.export.onnx_matmul_nbits import MICROSOFT, PackedMatrix, look_up_packed, multiply_packed
from workers.engine.export.onnx_qdq import Int8Matrix, QdqWriter
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.matmul_nbits import NBitsSolver, round_to_nearest
from workers.engine.quantize.onnx_images import quantize_images
from workers.engine.quantize.qdq import QdqSolver
from workers.engine.quantize.solutions import Solutions, stored_totals
from workers.engine.technique import StepContext, StepOutcome, implements

_SOLVED = 0.7
_HEAD_GRID = Grid(8, symmetric=True)
_HEAD_BLOCK = 32
_OUTSIDE = "layers outside the blocks (heads, poolers) stay in float32"
_ROUNDED, _ZEROED = "Their weights are rounded to nearest.", "Their weights became zero."
_SATURATES = "on x86 processors without VNNI, int8 products can saturate: check quality there"


@implements(QuantizeOnnx)
def quantize_onnx(step: QuantizeOnnx, context: StepContext) -> StepOutcome:
    """Write a quantized graph of `context.source` to `context.target`, its tokenizer and config beside it.

    Raises InvalidRequest when the calibration text is too short or a weight is not finite, JobFailed when the model
    cannot be calibrated or exported, VerificationFailed when the written file is not what was meant.
    """
    if context.facts.preprocessing is not None:
        return quantize_images(step, context)
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore)
    solutions, windows = _solve(step, selection, context)
    context.progress(_SOLVED, "exporting to ONNX")
    model = load_model(context.source)
    prefix = f"{model.base_model_prefix}."
    graph = export_graph(model, architecture_of(context.source))
    names = _names_in_graph(graph, solutions, prefix)
    context.progress(0.9, "writing and checking the files")
    _rewrite(step, graph, {name: solutions.matrices[stored] for name, stored in names.items()}, context)
    with TemporaryDirectory(prefix=".onnx-", dir=context.target) as scratch:
        save_graph(graph, Path(scratch) / "graph")
        publish_graph(Path(scratch) / "graph", context.target)
    check_graph(context.target, threads=context.threads)
    check_coverage(context.target / MODEL_FILE, names, _left(selection, prefix))
    copy_side_files(context.source, context.target)
    context.progress(1.0, "done")
    outcome = _outcome(step, solutions, selection, windows.numel())
    is_static = step.method_for(context.facts.family) == "qdq"
    return replace(
        outcome,
        warnings=(*outcome.warnings, _SATURATES) if is_static else outcome.warnings,
        flags=(
            *calibration_flags(context, windows, tokens=step.calibration_tokens),
            *solutions.silent.flags(dead_weights=_ZEROED if is_static else _ROUNDED),
        ),
    )


def _solve(
    step: QuantizeOnnx, selection: Selection, context: StepContext
) -> tuple[Solutions[Any], torch.Tensor]:
    """The matrix of every chosen layer, and the windows (windows, tokens) it was calibrated on."""
    wanted = frozenset(selection.chosen)
    solver: NBitsSolver | QdqSolver
    if step.method_for(context.facts.family) == "qdq":
        solver = QdqSolver(
            wanted,
            smoothing=step.smoothing,
            clips=step.ranges == "mse",
            damping=step.damping,
            threads=context.threads,
        )
    else:
        grid = Grid(step.bits, step.symmetric)
        solver = NBitsSolver(
            wanted, grid, block_size=step.block_size, damping=step.damping, threads=context.threads
        )
    with step_calibration(context, tokens=step.calibration_tokens, share=_SOLVED) as calibration:
        stream_blocks(calibration, prepare=solver.solve_block)
        return solver.solutions, calibration.windows


def _names_in_graph(graph: ir.Model, solutions: Solutions[Any], prefix: str) -> dict[str, str]:
    """Stored names of the solved weights by their names in the graph, which lack or bear the base model's prefix.

    Raises JobFailed for a weight that the graph multiplies by in no form we know.
    """
    by_plain = {name.removeprefix(prefix): name for name in linear_nodes(graph.graph)}
    found = {by_plain.get(stored.removeprefix(prefix)): stored for stored in solutions.matrices}
    missing = [stored for stored in solutions.matrices if stored.removeprefix(prefix) not in by_plain]
    if missing:
        raise JobFailed(
            f"The exported graph holds no product with {', '.join(missing)}.",
            code="onnx_layer_not_found",
            hint="Put these layers on the step's ignore list, or use quantize.calibrated.",
        )
    return {name: stored for name, stored in found.items() if name is not None}


def _rewrite(step: QuantizeOnnx, graph: ir.Model, matrices: dict[str, Any], context: StepContext) -> None:
    """Put the matrices into the graph; the token embedding follows in 8 bits if no product in float32 needs it."""
    linears = linear_nodes(graph.graph)
    if step.method_for(context.facts.family) == "qdq":
        QdqWriter(graph.graph, matrices).write(linears)
    else:
        graph.opset_imports[MICROSOFT] = 1
        for name, matrix in matrices.items():
            multiply_packed(graph.graph, linears[name], matrix)
        if step.quantize_head and context.facts.family is Family.CAUSAL_LM:
            _quantize_head(graph, context.threads)
    quantize_embedding(graph.graph)
    remove_unused(graph)


def _quantize_head(graph: ir.Model, threads: int) -> None:
    """Round the head to 8 bits, and let a tied embedding read the same table."""
    name, linear = next(
        (name, linear)
        for name, linear in linear_nodes(graph.graph).items()
        if block_index(name) is None
    )  # fmt: skip
    embedding = token_embedding(graph.graph)
    value = graph.graph.initializers[name].const_value
    if value is None:
        raise ValueError(f"{name} has no value")
    weight = torch.from_numpy(value.numpy().astype("float32"))
    matrix = round_to_nearest(weight, _HEAD_GRID, _HEAD_BLOCK, threads=threads)
    is_tied = embedding is not None and embedding.inputs[0] is graph.graph.initializers[name]
    multiply_packed(graph.graph, linear, matrix)
    if embedding is not None and is_tied and matrix.columns % _HEAD_BLOCK == 0:
        look_up_packed(graph.graph, embedding, name, matrix)


def _left(selection: Selection, prefix: str) -> set[str]:
    """Names, with and without the base model's prefix, of the weights that the spec leaves in float32."""
    plain = {layer.name.removeprefix(prefix) for layer in selection.untouched}
    return plain | {prefix + name for name in plain}


def _outcome(
    step: QuantizeOnnx, solutions: Solutions[PackedMatrix] | Solutions[Int8Matrix], selection: Selection, tokens: int
) -> StepOutcome:  # fmt: skip
    quantized = solutions.layers(selection)
    warnings = (*selection.warnings, *solutions.warnings, *(() if step.quantize_head else (_OUTSIDE,)))
    return StepOutcome(
        layers=(*quantized, *selection.untouched),
        metrics=solutions.totals() | stored_totals(quantized) | {"calibration_tokens": tokens},
        warnings=warnings,
    )
