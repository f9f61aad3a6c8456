"""An ONNX network through all stages of a job: read, pruned, trained, written, measured against the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_networks import IMAGE, Residual, write_tiny
from tiny_vision import write_images

from app.intake.read_model import read_model
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts
from app.spec.report import Report
from workers.engine import stages

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": IMAGE[1], "width": IMAGE[2]}, "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
}  # fmt: skip
STEP = {
    "technique": "prune.channels", "macs": 0.8, "calibration_images": 16, "batch_size": 8, "max_steps": 4, "evaluate_every": 2,
}  # fmt: skip


def write_model(directory: Path) -> ModelFacts:
    """The network as uploaded, and what intake says of it."""
    directory.mkdir(parents=True)
    write_tiny(Residual, directory / "model.onnx")
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return read_model({path.name: path for path in directory.iterdir()}).facts


def run_all(work: Path, spec: CompressionSpec) -> Path:
    """Run every stage; return the directory of the last."""
    inputs = work / "inputs"
    facts = write_model(inputs / "model")
    (inputs / "datasets").mkdir()
    write_images(inputs / "datasets" / "dst_1", images=48, side=24)
    done: dict[str, Path] = {}
    for number, name in enumerate(spec.stage_names()):
        directory = work / "stages" / f"{number:02d}-1"
        directory.mkdir(parents=True)
        metrics = stages.run(name, _context(work, spec, facts, directory, done))
        (directory / "stage.json").write_text(json.dumps({"seconds": 0.0, "peak_memory_bytes": 0, **metrics}))
        done[name] = directory
    return directory


def _context(
    work: Path, spec: CompressionSpec, facts: ModelFacts, directory: Path, done: dict[str, Path]
) -> stages.StageContext:
    return stages.StageContext(
        job_id="job_1",
        model_name="tiny",
        spec=spec,
        facts=facts,
        student_facts=None,
        inputs=work / "inputs",
        directory=directory,
        done=dict(done),
        device="cpu",
        threads=1,
        memory_budget=2**34,
        progress=lambda _share, _message: None,
        warn=lambda _message: None,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    work = tmp_path_factory.mktemp("job")
    images = {"dataset": "dst_1"}
    spec = CompressionSpec.model_validate(
        {
            "steps": [STEP],
            "training": images,
            "evaluation": {"text": images, "images": 24, "latency_rounds": 3},
        }
    )
    last = run_all(work, spec)
    return Report.model_validate_json((last / "report.json").read_text()), work


def test_the_report_compares_two_graphs(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    assert (report.original.runtime, report.architecture) == (report.result.runtime, "ONNX")
    assert report.result.parameters < report.original.parameters
    assert report.result.bytes < report.original.bytes
    assert report.comparison is not None
    assert report.comparison.accuracy_change is not None
    assert report.comparison.latency_ratio is not None
    metrics = report.steps[0].metrics
    assert metrics["macs_after"] <= 0.8 * metrics["macs_before"]
    assert len(report.coverage.compressed) == report.coverage.total == 9


def test_the_result_is_a_graph_that_can_be_uploaded_again(finished: tuple[Report, Path]) -> None:
    _, work = finished
    exported = work / "stages" / "03-1" / "model"
    facts = read_model({path.name: path for path in exported.iterdir()}).facts
    assert facts.num_labels == 5
    assert facts.preprocessing is not None
    assert facts.preprocessing.size == IMAGE[1:]
