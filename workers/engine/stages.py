"""The stages of a job: what each reads, and what it leaves for the next.

load      model/ (Hugging Face layout; GGUF converted), student/ if one was uploaded
baseline  evaluation.npz (of images: .npy) and prepared.json: what both models will be measured on
step n    model/ as the step left it, outcome.json
export    model/ as it will be published
verify    evaluated.json: what a fresh process measured that knew only the exported files
report    report.json, report.html
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import JobFailed
from app.spec.base import Step
from app.spec.compression import CompressionSpec, TextSource
from app.spec.distill import DistillLogits
from app.spec.facts import ModelFacts
from app.spec.plan import plan_job
from app.spec.report import Report, StepReport
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.device_shares import other_gpus
from workers.engine.checkpoint.gguf_source import convert_gguf
from workers.engine.measure.evaluate import check_original, evaluate
from workers.engine.measure.images import prepare_images
from workers.engine.measure.report import build_report, render_html
from workers.engine.measure.results import Evaluated, Pair, Prepared
from workers.engine.measure.windows import prepare_evaluation
from workers.engine.technique import Progress, StepContext, never, run_step

Metrics = dict[str, Any]
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage is given."""

    job_id: str
    model_name: str
    spec: CompressionSpec
    facts: ModelFacts
    student_facts: ModelFacts | None
    inputs: Path
    directory: Path
    """Empty; everything the stage leaves goes here."""
    done: dict[str, Path]
    """Directories of the stages before, by name."""
    device: str
    threads: int
    memory_budget: int
    progress: Progress
    stop_training: Callable[[], bool] = never
    warn: Callable[[str], None]

    @property
    def original(self) -> Path:
        """The model as it came in."""
        return self.done["load"] / "model"

    def text(self, source: TextSource, builtin: str) -> Path:
        """The file a text source means."""
        if source.dataset is not None:
            return self.inputs / "datasets" / source.dataset
        return builtin_text("evaluation" if builtin == "evaluation" else "calibration")

    def work(self, name: str) -> Path:
        """A directory for files in passing, outside of what the stage leaves."""
        path = self.directory.parent.parent / "tmp" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def run(name: str, context: StageContext) -> Metrics:
    """Run the stage of that name and return its metrics."""
    if name.startswith("step "):
        return _step(name, context)
    return {
        "load": _load,
        "baseline": _baseline,
        "export": _export,
        "verify": _verify,
        "report": _report,
    }[name](context)


def verdict(report_directory: Path) -> str:
    """The verdict of a finished job."""
    return Report.model_validate_json((report_directory / "report.json").read_text()).verdict


def _load(context: StageContext) -> Metrics:
    """Refuse what will not fit, then bring the model and the student into Hugging Face layout."""
    _require_room(context)
    for source, name in (("model", "model"), ("student", "student")):
        if (context.inputs / source).is_dir():
            _import(context.inputs / source, context.directory / name, context)
    context.progress(1.0, "model is in place")
    return {"bytes": _tree_bytes(context.directory / "model")}


def _require_room(context: StageContext) -> None:
    """Raise JobFailed when the job cannot end well on this worker: better now than at hour six."""
    student = context.spec.student_model_id()
    students = {student: context.student_facts} if student and context.student_facts else {}
    plan = plan_job(context.spec, context.facts, students=students, worker_memory=context.memory_budget)
    if not plan.fits:
        raise JobFailed(
            f"The job needs {plan.peak_memory_bytes / _GIB:.2f} GiB of memory; "
            f"this worker has {context.memory_budget / _GIB:.2f} GiB for it.",
            code="over_memory_budget",
            hint="Use a larger worker, or see POST /v1/plans for a spec that fits.",
        )
    free = shutil.disk_usage(context.directory).free
    if free < plan.disk_bytes:
        raise JobFailed(
            f"The job needs {plan.disk_bytes / _GIB:.2f} GiB of scratch space; {free / _GIB:.2f} GiB are free.",
            code="disk_full",
            hint="Free space where MODELPRESS_DATA_DIR lies, or move it to a larger disk.",
        )


def _import(source: Path, target: Path, context: StageContext) -> None:
    gguf = sorted(source.glob("*.gguf"))
    if gguf:
        target.mkdir()
        shard = context.spec.export.max_shard_bytes
        convert_gguf(gguf[0], target, max_shard_bytes=shard, progress=context.progress)
    else:
        # Nothing is copied, and no hard link made: that would be a name by which the store's file can be written.
        target.symlink_to(source)


def _baseline(context: StageContext) -> Metrics:
    """Cut the evaluation text, and make sure that the original itself works before hours are spent on it."""
    evaluation = context.spec.evaluation
    if not evaluation.enabled:
        context.progress(1.0, "evaluation is off")
        return {}
    source, seen = context.text(evaluation.text, "evaluation"), _seen_texts(context)
    if context.facts.preprocessing is not None:
        images_file = context.directory / "evaluation.npy"
        prepared = prepare_images(
            context.facts, evaluation, dataset=source, seen=seen, images_file=images_file
        )
    else:
        prepared = prepare_evaluation(
            context.original,
            context.facts,
            evaluation,
            text=source,
            seen=seen,
            windows_file=context.directory / "evaluation.npz",
        )
    (context.directory / "prepared.json").write_text(prepared.model_dump_json())
    metrics = check_original(
        context.original,
        prepared,
        work=context.work("baseline"),
        device=context.device,
        threads=context.threads,
        progress=context.progress,
    )
    context.progress(1.0, "original works")
    amount = {"tokens": prepared.text.tokens} if prepared.text else {}
    return amount | ({"images": prepared.images.images} if prepared.images else {}) | metrics


def _seen_texts(context: StageContext) -> list[Path]:
    """What the steps read: evaluation on the same text would flatter the result."""
    spec = context.spec
    seen = []
    if any(step.needs_calibration for step in spec.steps):
        seen.append(context.text(spec.calibration, "calibration"))
    if any(step.needs_training for step in spec.steps):
        seen.append(context.text(spec.training, "calibration"))
    return seen


def _step(name: str, context: StageContext) -> Metrics:
    """Run one technique on what the step before left."""
    index = [n for n in context.spec.stage_names() if n.startswith("step ")].index(name)
    step: Step = context.spec.steps[index]
    source = context.original
    for earlier, directory in context.done.items():
        if earlier.startswith("step "):
            source = directory / "model"
    target = context.directory / "model"
    target.mkdir()
    student = context.done["load"] / "student"
    calibration = context.text(context.spec.calibration, "calibration") if step.needs_calibration else None
    training = context.text(context.spec.training, "calibration") if step.needs_training else None
    takes_images = context.facts.preprocessing is not None
    began = time.perf_counter()
    outcome = run_step(
        step,
        StepContext(
            source=source,
            target=target,
            original=context.original,
            facts=context.facts,
            student=student if isinstance(step, DistillLogits) and student.is_dir() else None,
            calibration_text=None if takes_images else calibration,
            calibration_images=calibration if takes_images else None,
            training_text=None if takes_images else training,
            training_images=training if takes_images else None,
            device=context.device,
            more_devices=other_gpus(context.device),
            threads=context.threads,
            journal=context.directory.parent.parent / "journal" / str(index),
            memory_budget=context.memory_budget,
            max_shard_bytes=context.spec.export.max_shard_bytes,
            seed=context.spec.seed,
            progress=context.progress,
            stop_training=context.stop_training,
        ),
    )
    for warning in (*outcome.warnings, *(f"{flag.code}: {flag.detail}" for flag in outcome.flags)):
        context.warn(warning)
    report = StepReport(
        technique=context.spec.steps[index].technique,
        seconds=time.perf_counter() - began,
        metrics=outcome.metrics,
        curves=outcome.curves,
        layers=outcome.layers,
        warnings=outcome.warnings,
        flags=outcome.flags,
    )
    (context.directory / "outcome.json").write_text(report.model_dump_json())
    return outcome.metrics


def _export(context: StageContext) -> Metrics:
    """The last step's files, with a note of where they come from."""
    last = list(context.done.values())[-1]
    model = context.directory / "model"
    shutil.copytree(last / "model", model, copy_function=os.link)
    provenance = {
        "made_by": "modelpress",
        "job": context.job_id,
        "model": context.model_name,
        "spec": context.spec.model_dump(mode="json"),
    }
    (model / "modelpress.json").write_text(json.dumps(provenance, indent=2) + "\n")
    context.progress(1.0, "result is laid out")
    return {"bytes": _tree_bytes(model)}


def _verify(context: StageContext) -> Metrics:
    """Reload the exported files in fresh processes and measure original and result in turns."""
    prepared_file = context.done["baseline"] / "prepared.json"
    prepared = Prepared.model_validate_json(prepared_file.read_text()) if prepared_file.exists() else None
    pair = Pair(
        original=context.original,
        result=context.done["export"] / "model",
        work=context.work("verify"),
        device=context.device,
        threads=context.threads,
        seed=context.spec.seed,
        latency_rounds=context.spec.evaluation.latency_rounds,
        progress=context.progress,
    )
    evaluated = evaluate(pair, context.facts, prepared)
    (context.directory / "evaluated.json").write_text(evaluated.model_dump_json())
    shutil.rmtree(pair.work, ignore_errors=True)
    context.progress(1.0, "measured")
    if evaluated.comparison is None:
        return {}
    shown = evaluated.comparison.model_dump(exclude_none=True)
    return {key: value for key, value in shown.items() if isinstance(value, (int, float))}


def _report(context: StageContext) -> Metrics:
    """Write the report as data and as a page."""
    steps = []
    for name, directory in context.done.items():
        if name.startswith("step "):
            step = StepReport.model_validate_json((directory / "outcome.json").read_text())
            peak = json.loads((directory / "stage.json").read_text())["peak_memory_bytes"]
            steps.append(step.model_copy(update={"peak_memory_bytes": peak}))
    seconds = {
        name: json.loads((directory / "stage.json").read_text())["seconds"]
        for name, directory in context.done.items()
    }
    evaluated = Evaluated.model_validate_json((context.done["verify"] / "evaluated.json").read_text())
    report = build_report(
        job_id=context.job_id,
        model_name=context.model_name,
        facts=context.facts,
        spec=context.spec,
        evaluated=evaluated,
        steps=tuple(steps),
        stage_seconds=seconds,
        device=context.device,
        threads=context.threads,
    )
    (context.directory / "report.json").write_text(report.model_dump_json(indent=2))
    (context.directory / "report.html").write_text(render_html(report))
    context.progress(1.0, "report is written")
    return {"verdict": report.verdict}


def _tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory. Raises JobFailed when there is none."""
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if total == 0:
        raise JobFailed("The model's directory is empty.", code="empty_model")
    return total
