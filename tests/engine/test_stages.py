"""What stages pass on: the texts that steps read, and what steps found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import facts_of

from app.spec.compression import CompressionSpec
from app.spec.report import StepReport
from workers.engine import stages
from workers.engine.measure.results import Prepared

Tiny = Callable[[str], Path]


def context(
    model: Path, text: Path, tmp_path: Path, spec: dict[str, object], *, stage: str, warned: list[str]
) -> stages.StageContext:
    """A stage right after `load`, with one uploaded dataset."""
    (tmp_path / "inputs" / "datasets").mkdir(parents=True)
    shutil.copy(text, tmp_path / "inputs" / "datasets" / "dst_1")
    load = tmp_path / "stages" / "00-1"
    shutil.copytree(model, load / "model")
    directory = tmp_path / "stages" / stage
    directory.mkdir()
    return stages.StageContext(
        job_id="job_1",
        model_name="tiny",
        spec=CompressionSpec.model_validate(spec),
        facts=facts_of(model),
        student_facts=None,
        inputs=tmp_path / "inputs",
        directory=directory,
        done={"load": load},
        device="cpu",
        threads=1,
        memory_budget=2**33,
        progress=lambda _share, _message: None,
        warn=warned.append,
    )


@pytest.mark.slow
def test_baseline_compares_the_evaluation_text_with_what_steps_read(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    spec = {
        "steps": [{"technique": "prune.depth", "drop_blocks": 1}],
        "calibration": {"dataset": "dst_1"},
        "evaluation": {"text": {"dataset": "dst_1"}, "tokens": 256, "sequence_length": 64},
    }
    stage = context(tiny("LlamaForCausalLM"), tiny_text, tmp_path, spec, stage="01-1", warned=[])
    stages.run("baseline", stage)
    prepared = Prepared.model_validate_json((stage.directory / "prepared.json").read_text())
    # Sequences that cross from one of these short documents to the next are not looked for.
    assert prepared.text.overlap_share is not None
    assert prepared.text.overlap_share > 0.7


def test_what_a_step_flags_is_said_at_once_and_kept_for_the_report(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    warned: list[str] = []
    spec = {
        "steps": [{"technique": "prune.depth", "drop_blocks": 1, "calibration_tokens": 100_000}],
        "calibration": {"dataset": "dst_1"},
    }
    stage = context(tiny("LlamaForCausalLM"), tiny_text, tmp_path, spec, stage="02-1", warned=warned)
    stages.run("step 1: prune.depth", stage)
    report = StepReport.model_validate_json((stage.directory / "outcome.json").read_text())
    assert [flag.code for flag in report.flags] == ["calibration_short"]
    assert warned == [f"calibration_short: {report.flags[0].detail}"]
