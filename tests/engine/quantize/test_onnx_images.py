"""quantize.onnx on tiny image classifiers: what onnxruntime runs of the written files, and the statistics behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import changed, facts_of
from tiny_vision import LABELS, SIDE, write_images
from torch import nn

from app.errors import InvalidRequest, VerificationFailed
from app.spec.quantize_onnx import QuantizeOnnx
from workers.engine.architectures.loading import load_model
from workers.engine.architectures.norm_folding import fold_batch_norms
from workers.engine.export.onnx import open_session, save_graph
from workers.engine.export.onnx_coverage import check_image_coverage
from workers.engine.export.onnx_images import PIXELS, export_image_graph
from workers.engine.export.onnx_qdq import InputGrid
from workers.engine.export.onnx_qdq_images import _coarse_enough
from workers.engine.quantize.forward_solver import ForwardSolver, Int8Weight
from workers.engine.quantize.patches import groups_of, second_moments
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
RESNET, MOBILENET = "ResNetForImageClassification", "MobileNetV2ForImageClassification"
INTEGER = {"QLinearConv", "QGemm", "MatMulIntegerToFloat"}


def quantize(source: Path, target: Path, **settings: object) -> StepOutcome:
    target.mkdir(exist_ok=True)
    images = write_images(target.parent / f"{target.name}-images", images=16)
    step = QuantizeOnnx.model_validate({"method": "qdq", "calibration_images": 16, **settings})
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_images=images, threads=1
    )  # fmt: skip
    return run_step(step, context)


def operators(directory: Path, scratch: Path) -> Counter[str]:
    """Of the graph that onnxruntime makes of the file and runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(scratch / "optimized.onnx").graph.node)


@pytest.mark.parametrize(
    ("architecture", "sums"), [(RESNET, 3), (MOBILENET, 10), ("ViTForImageClassification", 0)]
)
def test_onnxruntime_computes_every_layer_in_integers(
    architecture: str, sums: int, tiny: Tiny, tmp_path: Path
) -> None:
    outcome = quantize(tiny(architecture), tmp_path / "out")
    found = operators(tmp_path / "out", tmp_path)
    assert sum(found[kind] for kind in INTEGER) == len(outcome.layers)
    assert found["QLinearAdd"] == sums
    assert not found.keys() & {
        "Conv",
        "FusedConv",
        "Gemm",
        "MaxPool",
        "Pad",
        "Relu",
        "Clip",
        "BatchNormalization",
    }
    assert all(layer.action == "quantized" for layer in outcome.layers)
    assert outcome.metrics["calibration_images"] == 16


def test_an_ignored_layer_stays_in_float_and_is_named(tiny: Tiny, tmp_path: Path) -> None:
    outcome = quantize(tiny(RESNET), tmp_path / "out", ignore=["*.embedder.*", "classifier*"])
    left = {layer.name: layer.reason for layer in outcome.layers if layer.action == "untouched"}
    assert set(left) == {"resnet.embedder.embedder.convolution.weight", "classifier.1.weight"}
    assert "ignored by" in str(left["classifier.1.weight"])
    found = operators(tmp_path / "out", tmp_path)
    assert sum(found[kind] for kind in INTEGER) == len(outcome.layers) - 2
    with pytest.raises(VerificationFailed, match=r"classifier\.1\.weight"):
        check_image_coverage(
            tmp_path / "out" / "model.onnx", {n.name for n in outcome.layers} - left.keys(), set()
        )


@pytest.mark.parametrize("architecture", [RESNET, MOBILENET])
def test_the_folded_graph_gives_what_the_model_gives(architecture: str, tiny: Tiny, tmp_path: Path) -> None:
    model, pixels = load_model(tiny(architecture)), torch.randn(3, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = model(pixels)[0].numpy()
    fold_batch_norms(model)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    save_graph(export_image_graph(model, architecture, (3, SIDE, SIDE)), tmp_path / "graph")
    session = open_session(tmp_path / "graph", threads=1)
    found = session.run(None, {PIXELS: pixels.numpy()})[0]
    assert found.shape == (3, LABELS)
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("groups", "options"),
    [(1, {}), (3, {"stride": 2, "padding": 1}), (6, {"padding": (2, 0), "dilation": 2})],
)
def test_moments_of_a_convolution_are_those_of_its_patches(groups: int, options: dict[str, object]) -> None:
    layer = nn.Conv2d(6, 12, (3, 2), groups=groups, **options)  # type: ignore[arg-type]
    inputs = torch.randn(5, 6, 9, 8, generator=torch.Generator().manual_seed(0))
    moments = second_moments(layer, inputs)
    assert moments.shape == (groups, 36 // groups, 36 // groups)
    assert groups_of(layer) == groups
    # wᵀ H w is the mean square of what the layer gives without its bias.
    outputs = layer.double()(inputs.double()) - layer.bias.view(-1, 1, 1)
    rows = layer.weight.flatten(1).chunk(groups)
    energies = [torch.einsum("ri,ij,rj->r", w, h.double(), w) for w, h in zip(rows, moments, strict=True)]
    assert torch.allclose(torch.cat(energies), outputs.square().mean((0, 2, 3)), rtol=1e-5)


def test_moments_of_a_linear_layer_are_those_of_its_rows() -> None:
    inputs = torch.randn(4, 7, 5)
    rows = inputs.flatten(0, 1)
    assert torch.allclose(second_moments(nn.Linear(5, 2), inputs)[0], rows.t() @ rows / 28, atol=1e-5)


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Channels of very different sizes: one grid is too coarse for the small ones.
        scales = 10.0 ** -torch.arange(8.0).view(-1, 1, 1).div(2)
        return self.second(torch.relu(self.first(pixel_values)) * scales)


def test_biases_take_what_rounding_shifts() -> None:
    model, pixels = _TwoLayers().eval(), torch.rand(16, 3, 8, 8)
    original = _TwoLayers().eval()
    solver = ForwardSolver({"first": "a", "second": "b"}, 0.01, False, 1, lambda *_: None)
    solver.solve(model, pixels)
    second = model.second.bias - original.second.bias
    assert second.abs().max() > 1e-5
    assert all(weight.codes.dtype == np.int8 for weight in solver.solutions.matrices.values())
    restored = solver.solutions.matrices["b"]
    assert torch.allclose(
        model.second.weight, torch.from_numpy(restored.codes * restored.scales[:, None, None, None])
    )


def test_a_channel_too_faint_for_its_bias_gets_a_coarser_scale() -> None:
    weight = Int8Weight(np.asarray([[127], [127]], np.int8), np.asarray([1e-12, 0.1], np.float32))
    grid, bias = InputGrid.spanning(0, 25.5, None), np.asarray([3.0, 3.0], np.float32)
    found = _coarse_enough(weight, bias, grid)
    assert np.abs(bias / (found.scales * grid.scale)).max() < 2**31 - 1
    assert (found.codes[:, 0] == [0, 127]).all()
    assert found.scales[1] == weight.scales[1]


def test_weights_that_are_not_finite_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["classifier.1.weight"][0, 0] = float("nan")

    with pytest.raises(InvalidRequest, match=r"classifier\.1\.weight"):
        quantize(changed(tiny(RESNET), tmp_path / "spoilt", spoil), tmp_path / "out")


def test_too_few_images_are_flagged(tiny: Tiny, tmp_path: Path) -> None:
    outcome = quantize(tiny(RESNET), tmp_path / "out", calibration_images=40)
    assert [flag.code for flag in outcome.flags] == ["calibration_short"]
