"""The contract of a technique, held against every one there is on tiny image classifiers: it is kept, or refused at submit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from technique_runs import digests
from tiny_models import IMAGE_ARCHITECTURES, facts_of
from tiny_vision import LABELS, write_images

from app.spec.base import Step
from app.spec.compatibility import check_spec
from app.spec.compression import STEP_CLASSES, CompressionSpec
from app.spec.plan import plan_job
from app.spec.quantize import QuantizedWeights
from workers.engine.images.image_set import ImageSet
from workers.engine.measure.runner import load
from workers.engine.technique import StepContext, StepOutcome, run_step

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "quantize.weights": {
        "int8": {"bits": 8},
        "int4": {"group_size": 32, "symmetric": False},
        "mixed": {"group_size": 32, "overrides": [{"layers": "*output.dense", "bits": 8}]},
        "fp8": {"number_format": "fp8", "activations": "dynamic"},
    },
    "quantize.calibrated": {
        "int4": {"group_size": 32},
        "w8a8-static": {"bits": 8, "activations": "static"},
        "tuned": {"bits": 3, "solver": "signround", "tuning_steps": 2, "scaling": "smoothquant", "bias_correction": True},
    },
    "quantize.onnx": {"qdq": {"method": "qdq"}, "clipped": {"method": "auto", "ranges": "mse"}},
}  # fmt: skip
IMAGES = 12
VIT, RESNET = "ViTForImageClassification", "ResNetForImageClassification"


class Stopped(Exception):  # noqa: N818 - what a cancelled job raises is no error
    """Raised by progress to cancel."""


@dataclass
class Run:
    """What a technique was given, wrote and said."""

    step: Step
    source: Path
    target: Path
    outcome: StepOutcome
    progress: list[float] = field(default_factory=list)


def _steps() -> list[tuple[Step, str]]:
    named = [(cls, cls.model_fields["technique"].default) for cls in STEP_CLASSES]
    settings = [(cls, SETTINGS.get(name, {"defaults": {}}).values()) for cls, name in named]
    return [(cls(**given), a) for cls, many in settings for given in many for a in IMAGE_ARCHITECTURES]


def _is_accepted(step: Step, facts: Any) -> bool:
    return not check_spec(CompressionSpec(steps=(step,)), facts)


def _id(value: Any) -> str:
    return value if isinstance(value, str) else str(value.model_dump(exclude_defaults=True))[:60]


def _runs_on(step: Step, architecture: str) -> bool:
    is_transformer = architecture.startswith(("ViT", "DeiT"))
    technique = str(step.model_dump()["technique"])
    return technique == "quantize.onnx" or (
        is_transformer and technique in ("quantize.weights", "quantize.calibrated")
    )


CASES = [
    pytest.param(step, architecture, id=f"{_id(step)}-{architecture}")
    for step, architecture in _steps()
    # The twins are built of the same layers: one setting of each is enough.
    if _runs_on(step, architecture)
    and (architecture in (VIT, RESNET) or step.model_dump().get("ranges") == "minmax")
]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "set", images=IMAGES)


def context_for(step: Step, source: Path, target: Path, images: Path, **more: Any) -> StepContext:
    return StepContext(
        source=source, target=target, original=source, facts=facts_of(source),
        calibration_images=images if step.needs_calibration else None, threads=2, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[[str], Path], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Step, str], Run]:
    """Run a step the first time it is asked for."""
    done: dict[str, Run] = {}

    def run(step: Step, architecture: str) -> Run:
        key = f"{step!r} {architecture}"
        if key not in done:
            source, target = tiny(architecture), tmp_path_factory.mktemp("target")
            said: list[float] = []
            before = digests(source)
            context = context_for(step, source, target, images, progress=lambda share, _: said.append(share))
            done[key] = Run(step, source, target, run_step(step, context), said)
            assert digests(source) == before
        return done[key]

    return run


@pytest.mark.parametrize(("step", "architecture"), _steps(), ids=_id)
def test_a_technique_is_accepted_where_it_is_known_to_work_and_refused_elsewhere(
    step: Step, architecture: str, tiny: Callable[[str], Path]
) -> None:
    assert _is_accepted(step, facts_of(tiny(architecture))) == _runs_on(step, architecture)


@pytest.mark.parametrize(("step", "architecture"), CASES)
def test_result_is_read_by_the_loader_it_is_written_for_and_close_to_the_original(
    step: Step, architecture: str, runs: Callable[[Step, str], Run], images: Path
) -> None:
    run = runs(step, architecture)
    pixels = next(ImageSet(images).chunks(IMAGES))
    outputs = []
    for directory in (run.source, run.target):
        with warnings.catch_warnings():
            # compressed-tensors and transformers deprecate parts of each other while loading.
            warnings.simplefilter("ignore")
            runner = load(directory, device="cpu", threads=1)
        assert not runner.facts.loading.missing + runner.facts.loading.unexpected
        outputs.append(runner.outputs(pixels))
    assert outputs[1].shape == (IMAGES, LABELS)
    assert np.isfinite(outputs[1]).all()
    spread = outputs[0] - outputs[0].mean(0)
    # Fifty layers of noise carry every rounding further.
    most = {"ResNet": 0.3, "ViT": 0.4, "DeiT": 0.4}.get(
        architecture.removesuffix("ForImageClassification"), 1.5
    )
    assert np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(spread) < most


@pytest.mark.parametrize(("step", "architecture"), CASES)
def test_every_layer_is_accounted_for_once(
    step: Step, architecture: str, runs: Callable[[Step, str], Run]
) -> None:
    run = runs(step, architecture)
    names = [layer.name for layer in run.outcome.layers]
    assert sorted(names) == sorted(tensor.name for tensor in facts_of(run.source).compressible())
    left = [layer for layer in run.outcome.layers if layer.action == "untouched"]
    assert all(layer.reason for layer in left)
    # Files with packed weights hold the blocks of a transformer; the classifier and the patches' convolution stay.
    assert len(left) == (2 if isinstance(step, QuantizedWeights) else 0)
    most = {8: 0.05, 4: 0.2, 3: 0.4}[step.bits]  # type: ignore[attr-defined]
    assert all(0 < layer.relative_error < most for layer in run.outcome.layers if layer not in left)


@pytest.mark.parametrize(("step", "architecture"), CASES)
def test_target_holds_weights_and_side_files_alone(
    step: Step, architecture: str, runs: Callable[[Step, str], Run]
) -> None:
    run = runs(step, architecture)
    weights = "model.onnx" if step.produces == "onnx" else "model.safetensors"
    assert set(digests(run.target)) == {weights, "config.json", "preprocessor_config.json"}


@pytest.mark.parametrize(("step", "architecture"), CASES)
def test_progress_grows_from_0_to_1(step: Step, architecture: str, runs: Callable[[Step, str], Run]) -> None:
    shares = runs(step, architecture).progress
    assert len(shares) >= 2
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(("step", "architecture"), CASES)
def test_the_plan_knows_the_bytes_that_are_written(
    step: Step, architecture: str, runs: Callable[[Step, str], Run]
) -> None:
    run = runs(step, architecture)
    written = max(file.stat().st_size for file in run.target.iterdir())
    planned = plan_job(CompressionSpec(steps=(step,)), facts_of(run.source)).output_bytes
    # Of ONNX an estimate: the graphs of these models are nearly as large as their weights.
    assert planned == pytest.approx(written, rel=0.35 if step.produces == "onnx" else 0.005)


REPEATED = [case for case in CASES if case.values[1] in (VIT, RESNET)][::3]


@pytest.mark.parametrize(("step", "architecture"), REPEATED)
def test_same_seed_gives_the_same_bytes(
    step: Step, architecture: str, runs: Callable[[Step, str], Run], images: Path, tmp_path: Path
) -> None:
    first = runs(step, architecture)
    run_step(step, context_for(step, first.source, tmp_path, images))
    assert digests(tmp_path) == digests(first.target)


@pytest.mark.parametrize(("step", "architecture"), REPEATED)
def test_progress_that_raises_stops_the_technique_at_once(
    step: Step, architecture: str, tiny: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    count = 0

    def progress(share: float, message: str) -> None:
        nonlocal count
        count += 1
        if count >= 2:
            raise Stopped

    context = context_for(step, tiny(architecture), tmp_path, images, progress=progress)
    with pytest.raises(Stopped):
        run_step(step, context)
    # Threads that were under way may each say one thing more.
    assert count <= 2 + context.threads
    assert torch.is_grad_enabled()
