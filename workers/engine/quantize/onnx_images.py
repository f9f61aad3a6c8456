"""quantize.onnx for image classifiers: every convolution and linear layer in int8, with static int8 activations.

Batch norms are folded into the convolutions before them; the layers are rounded with compensation while all calibration
images go through the model once (`forward_solver.py`); the graph is exported with the rounded weights, and the ranges of
its values are measured in onnxruntime (`graph_ranges.py`). The written file is read again: a layer that is not computed
from integers there, and was not to be left, fails the job.
Left out: equalising channels across layers (Nagel et al. 2019, sec. 4.1), which ReLU6 does not commute with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from app.errors import JobFailed
from app.spec.image_costs import IMAGES_AT_ONCE
from app.spec.quantize_onnx import QuantizeOnnx
from workers.engine.architectures.loading import architecture_of, load_model
from workers.engine.architectures.names import name_in_memory
from workers.engine.architectures.norm_folding import fold_batch_norms
from workers.engine.checkpoint.reader import Checkpoint
from workers.engine.checkpoint.selection import Selection, module_name, select_layers
from workers.engine.checkpoint.side_files import copy_side_files
from workers.engine.export.onnx import MODEL_FILE, publish_graph, save_graph
from workers.engine.export.onnx_coverage import check_image_coverage
from workers.engine.export.onnx_graph import remove_unused
from workers.engine.export.onnx_images import check_image_graph, export_image_graph
from workers.engine.export.onnx_qdq import InputGrid
from workers.engine.export.onnx_qdq_images import biased_nodes, product_nodes, rounded_values, write_qdq
from workers.engine.images.calibration import calibration_image_flags, calibration_pixels
from workers.engine.quantize.forward_solver import ForwardSolver, Int8Weight
from workers.engine.quantize.graph_ranges import value_ranges
from workers.engine.quantize.solutions import Solutions, stored_totals
from workers.engine.technique import StepContext, StepOutcome

_SOLVED, _EXPORTED, _RANGED = 0.6, 0.75, 0.9
_SATURATES = "on x86 processors without VNNI, int8 products can saturate: check quality there"


def quantize_images(step: QuantizeOnnx, context: StepContext) -> StepOutcome:
    """Write an int8 graph of an image classifier to `context.target`, its preprocessor and config beside it.

    Raises JobFailed when the model cannot be calibrated or exported, VerificationFailed when the written file is not what
    was meant.
    """
    selection = select_layers(Checkpoint.open(context.source), step.ignore, everywhere=True)
    architecture = architecture_of(context.source)
    modules = {module_name(name_in_memory(stored, architecture)): stored for stored in selection.chosen}
    pixels = calibration_pixels(context, step.calibration_images)
    model = load_model(context.source, device=context.device)
    fold_batch_norms(model)
    solver = ForwardSolver(
        modules,
        step.damping,
        step.ranges == "mse",
        context.threads,
        lambda share, what: context.progress(_SOLVED * share, what),
    )
    solver.solve(model, torch.from_numpy(pixels).to(context.device))
    context.progress(_SOLVED, "exporting to ONNX")
    graph = export_image_graph(model.to("cpu"), architecture, pixels.shape[1:])
    weights = {f"{module}.weight": solver.solutions.matrices[stored] for module, stored in modules.items()}
    _require_all(graph, weights)
    context.progress(_EXPORTED, "measuring activations")
    _write(step, graph, weights, pixels, context)
    left = {name_in_memory(layer.name, architecture) for layer in selection.untouched}
    check_image_graph(context.target, pixels.shape[1:], threads=context.threads)
    check_image_coverage(context.target / MODEL_FILE, weights, left)
    copy_side_files(context.source, context.target)
    context.progress(1.0, "done")
    return _outcome(step, solver.solutions, selection, len(pixels))


def _require_all(graph: ir.Model, weights: dict[str, Int8Weight]) -> None:
    missing = sorted(weights.keys() - biased_nodes(graph.graph).keys() - product_nodes(graph.graph).keys())
    if missing:
        raise JobFailed(
            f"The exported graph holds no product with {', '.join(missing)}.",
            code="onnx_layer_not_found",
            hint="Put these layers on the step's ignore list.",
        )


def _write(
    step: QuantizeOnnx,
    graph: ir.Model,
    weights: dict[str, Int8Weight],
    pixels: NDArray[np.float32],
    context: StepContext,
) -> None:
    """Measure ranges, put the int8 layers into the graph, and write it."""
    rounded = rounded_values(graph.graph, weights)

    def batches() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(pixels), IMAGES_AT_ONCE):
            context.progress(_EXPORTED, "measuring activations")
            yield pixels[start : start + IMAGES_AT_ONCE]

    with TemporaryDirectory(prefix=".onnx-", dir=context.target) as scratch:
        ranges = value_ranges(
            graph,
            rounded.ranged,
            batches,
            Path(scratch) / "watched",
            clips=step.ranges == "mse",
            threads=context.threads,
        )
        context.progress(_RANGED, "writing and checking the files")
        grids = {name: InputGrid.spanning(*ends, None) for name, ends in ranges.items()}
        write_qdq(graph.graph, weights, rounded, grids)
        remove_unused(graph)
        save_graph(graph, Path(scratch) / "graph")
        publish_graph(Path(scratch) / "graph", context.target)


def _outcome(
    step: QuantizeOnnx, solutions: Solutions[Int8Weight], selection: Selection, images: int
) -> StepOutcome:
    quantized = solutions.layers(selection)
    return StepOutcome(
        layers=(*quantized, *selection.untouched),
        metrics=solutions.totals() | stored_totals(quantized) | {"calibration_images": images},
        warnings=(*selection.warnings, *solutions.warnings, _SATURATES),
        flags=(
            *calibration_image_flags(images, wanted=step.calibration_images),
            *solutions.silent.flags(dead_weights=""),
        ),
    )
