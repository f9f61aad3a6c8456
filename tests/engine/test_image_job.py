"""A whole job for an image classifier, stage after stage, as a worker runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import facts_of
from tiny_vision import write_images

from app.spec.compression import CompressionSpec
from app.spec.report import Report
from workers import events
from workers.engine.pipeline import Job, run_job

QDQ = {"technique": "quantize.onnx", "method": "auto", "calibration_images": 8}


@pytest.mark.parametrize("architecture", ["ResNetForImageClassification", "ViTForImageClassification"])
def test_a_job_ends_with_a_report_on_its_images(
    architecture: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = {"dataset": "dst_1"}
    spec = CompressionSpec.model_validate(
        {
            "steps": [QDQ],
            "calibration": source,
            "evaluation": {"text": source, "images": 12, "latency_rounds": 3},
            "acceptance": {"min_top1_agreement": 0.5, "max_accuracy_drop": 0.5, "max_kl": 1.0},
        }
    )
    inputs = tmp_path / "inputs"
    shutil.copytree(tiny(architecture), inputs / "model")
    (inputs / "datasets").mkdir()
    write_images(inputs / "datasets" / "dst_1", images=20)
    said: list[events.Event] = []
    job = Job(
        job_id="job_1", model_name="tiny", model_sha256="0" * 64, spec=spec, facts=facts_of(tiny(architecture)),
        student_facts=None, inputs=inputs, stages=tmp_path / "stages", stop_file=tmp_path / "stop", fence=1, committed=(), device="cpu", threads=1,
        memory_budget=2**34,
    )  # fmt: skip
    run_job(job, said.append)
    failed = [event for event in said if isinstance(event, events.Failed)]
    assert not failed
    directories = sorted((tmp_path / "stages").iterdir())
    report = Report.model_validate_json((directories[-1] / "report.json").read_text())
    assert report.verdict == "accepted"
    assert report.evaluation_images is not None
    assert (report.evaluation_images.images, report.evaluation_images.overlap_share) == (12, 1.0)
    assert len(report.coverage.compressed) == report.coverage.total
    assert all(limit.measured is not None for limit in report.limits)
    assert {"top1_accuracy"} == report.result.quality.keys()
    exported = next(d for d in directories if (d / "model" / "modelpress.json").is_file()) / "model"
    assert {file.name for file in exported.iterdir()} == {
        "model.onnx", "config.json", "preprocessor_config.json", "modelpress.json",
    }  # fmt: skip
    assert json.loads((exported / "modelpress.json").read_text())["job"] == "job_1"
