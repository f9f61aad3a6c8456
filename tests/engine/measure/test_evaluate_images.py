"""Image classifiers measured the whole way: real processes, real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Tensors, changed, facts_of
from tiny_vision import LABELS, SIDE, write_images

from app.spec.compression import Acceptance, CompressionSpec, Evaluation
from app.spec.quantize import QuantizeWeights
from workers.engine.architectures.loading import load_model
from workers.engine.images.image_set import ImageSet
from workers.engine.images.pixels import pixel_values, preprocessing_of
from workers.engine.measure.acceptance import limits, verdict
from workers.engine.measure.evaluate import check_original, evaluate
from workers.engine.measure.images import prepare_images
from workers.engine.measure.report import build_report, render_html
from workers.engine.measure.results import Evaluated, Pair, Prepared

Tiny = Callable[[str], Path]


def rounded(tensors: Tensors) -> None:
    for tensor in tensors.values():
        if tensor.ndim in (2, 4):
            tensor.copy_((tensor * 16).round() / 16)


def prepare(model: Path, work: Path, *, seen: tuple[Path, ...] = (), **images: object) -> Prepared:
    work.mkdir(parents=True, exist_ok=True)
    dataset = write_images(work / "images", **images)  # type: ignore[arg-type]
    evaluation = Evaluation(images=20)
    return prepare_images(
        facts_of(model), evaluation, dataset=dataset, seen=seen, images_file=work / "images.npy"
    )


@pytest.fixture(scope="module")
def measured(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluated, Path, Path]:
    """A ResNet against itself with rounded weights; its directory and that of the result."""
    work, model = tmp_path_factory.mktemp("images"), tiny("ResNetForImageClassification")
    result = changed(model, work / "result", rounded)
    pair = Pair(original=model, result=result, work=work, threads=1, latency_rounds=3)
    seen = write_images(work / "seen", images=5)
    return evaluate(pair, facts_of(model), prepare(model, work, seen=(seen,))), model, result


def logits(model: Path, dataset: Path) -> np.ndarray:
    images = load_file(dataset)["images"][ImageSet(dataset).order[:20]].permute(0, 3, 1, 2).numpy()
    values = torch.from_numpy(pixel_values(images, preprocessing_of(model)))
    with torch.inference_mode():
        return load_model(model)(values)[0].numpy()


def test_accuracy_and_agreement_are_those_of_a_plain_pass(
    measured: tuple[Evaluated, Path, Path], tmp_path: Path
) -> None:
    found, model, result = measured
    dataset = write_images(tmp_path / "images")
    labels = load_file(dataset)["labels"][ImageSet(dataset).order[:20]].numpy()
    before, after = (logits(directory, dataset).argmax(1) for directory in (model, result))
    comparison = found.comparison
    assert comparison is not None
    assert found.original.quality["top1_accuracy"] == np.mean(before == labels)
    assert found.result.quality["top1_accuracy"] == np.mean(after == labels)
    assert comparison.accuracy_change is not None
    assert comparison.accuracy_change[0] == pytest.approx(
        np.mean(after == labels) - np.mean(before == labels)
    )
    assert comparison.accuracy_change[1] <= comparison.accuracy_change[0] <= comparison.accuracy_change[2]
    assert comparison.top1_agreement == np.mean(before == after)
    assert comparison.kl_mean is not None
    assert comparison.kl_mean > 1e-5


def test_speed_memory_and_images_are_reported(measured: tuple[Evaluated, Path, Path]) -> None:
    found, _, result = measured
    assert [latency.what for latency in found.result.latency] == [
        f"batch 1 of {SIDE}×{SIDE} pixels",
        f"batch 8 of {SIDE}×{SIDE} pixels",
    ]
    assert found.result.peak_memory_bytes is not None
    assert found.images is not None
    assert (found.images.images, found.images.labelled) == (20, True)
    # The first five come from the same seed.
    assert found.images.overlap_share == np.mean(ImageSet(result.parent / "images").order[:20] < 5)
    assert Evaluated.model_validate_json(found.model_dump_json()) == found


def test_the_report_and_its_page_speak_of_images(measured: tuple[Evaluated, Path, Path]) -> None:
    found, model, _ = measured
    report = build_report(
        job_id="job_1",
        model_name="tiny",
        facts=facts_of(model),
        spec=CompressionSpec(steps=(QuantizeWeights(),), acceptance=Acceptance(max_accuracy_drop=1.0)),
        evaluated=found,
        steps=(),
        stage_seconds={},
        device="cpu",
        threads=1,
    )
    page = render_html(report)
    assert "Accuracy" in page
    assert f"20 of {SIDE} × {SIDE}, with labels" in page
    assert {flag.code for flag in report.flags} >= {"evaluation_overlap"}
    assert "builtin_text" not in {flag.code for flag in report.flags}


def test_limits_of_accuracy_decide_the_verdict(measured: tuple[Evaluated, Path, Path]) -> None:
    found, _, _ = measured
    assert found.comparison is not None
    worse = found.comparison.model_copy(update={"accuracy_change": (-0.1, -0.2, 0.0)})
    judged = found.model_copy(update={"comparison": worse})
    for allowed, wanted in ((0.11, "accepted"), (0.09, "rejected")):
        (limit,) = limits(Acceptance(max_accuracy_drop=allowed), judged, "image_classifier")
        assert limit.measured == pytest.approx(0.1)
        assert verdict((limit,), (), judged) == wanted


def test_images_without_labels_are_compared_all_the_same(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("ViTForImageClassification")
    pair = Pair(original=model, result=model, work=tmp_path, threads=1, latency_rounds=3)
    found = evaluate(pair, facts_of(model), prepare(model, tmp_path, labels=False))
    assert found.comparison is not None
    assert found.comparison.accuracy_change is None
    assert (found.comparison.top1_agreement, found.original.quality) == (1.0, {})


def test_without_images_the_files_are_tried_on_noise(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("MobileNetV2ForImageClassification")
    found = evaluate(Pair(original=model, result=model, work=tmp_path), facts_of(model), None)
    assert found.comparison is None
    assert found.verification.output_cosine == pytest.approx(1.0)


def test_images_of_another_size_are_made_fit_before_the_original_is_tried(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("DeiTForImageClassification")
    prepared = prepare(model, tmp_path, side=40)
    assert prepared.images is not None
    assert (prepared.images.height, prepared.labels and max(prepared.labels) < LABELS) == (SIDE, True)
    metrics = check_original(
        model, prepared, work=tmp_path, device="cpu", threads=1, progress=lambda *_: None
    )
    assert metrics["peak_memory_bytes"] > 0
