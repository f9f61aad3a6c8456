"""Run the stages of a job, each into a directory of its own: load → baseline → steps → export → verify → report.

A stage reads what earlier ones left on disk and nothing else, so a job that was killed goes on at the first stage that
was not committed, in another process, with the same result.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import ModelpressError, OutOfMemory
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts
from workers import events
from workers.engine import stages
from workers.engine.stages import StageContext

STAGE_FILE = "stage.json"

Emit = Callable[[events.Event], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the supervisor says in a job file."""

    job_id: str
    model_name: str
    model_sha256: str
    spec: CompressionSpec
    facts: ModelFacts
    student_facts: ModelFacts | None
    inputs: Path
    stages: Path
    stop_file: Path
    """There once training is to end at its best state so far."""
    fence: int
    committed: tuple[str, ...]
    """Directories below `stages` of the stages that are done, in order."""
    device: str
    threads: int
    memory_budget: int

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job file."""
        content = json.loads(path.read_text())
        content["spec"] = CompressionSpec.model_validate(content["spec"])
        content["facts"] = ModelFacts.model_validate(content["facts"])
        student = content["student_facts"]
        content["student_facts"] = student and ModelFacts.model_validate(student)
        for name in ("inputs", "stages", "stop_file"):
            content[name] = Path(content[name])
        content["committed"] = tuple(content["committed"])
        return cls(**content)


def run_job(job: Job, emit: Emit) -> None:
    """Run what is left of a job; the last event is `finished` or `failed`."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.spec.seed)
    names = job.spec.stage_names()
    done = list(job.committed)
    running = names[len(done)] if len(done) < len(names) else names[-1]
    try:
        for number in range(len(done), len(names)):
            running = names[number]
            done.append(_run_stage(job, number, tuple(done), emit))
        emit(events.Finished(verdict=stages.verdict(job.stages / done[-1])))
    except Exception as error:  # noqa: BLE001 - whatever happens must reach the row of the job
        traceback.print_exc()
        emit(_failed(error, running))


_MEMORY_HINT = "Use a larger worker, or see POST /v1/plans for what the job needs and a spec that fits."


def _run_stage(job: Job, number: int, done: tuple[str, ...], emit: Emit) -> str:
    """Run one stage and return the name of its directory, complete and synced."""
    name = job.spec.stage_names()[number]
    emit(events.StageStarted(stage=number, name=name))
    directory = job.stages / f"{number:02d}-{job.fence}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)

    def progress(fraction: float, message: str) -> None:
        emit(events.Progress(stage=number, fraction=min(1.0, max(0.0, fraction)), message=message[:500]))

    context = StageContext(
        job_id=job.job_id,
        model_name=job.model_name,
        spec=job.spec,
        facts=job.facts,
        student_facts=job.student_facts,
        inputs=job.inputs,
        directory=directory,
        done=dict(zip(job.spec.stage_names(), (job.stages / d for d in done), strict=False)),
        device=job.device,
        threads=job.threads,
        memory_budget=job.memory_budget,
        progress=progress,
        stop_training=job.stop_file.exists,
        warn=lambda message: emit(events.Warning(message=message[:2000])),
    )
    began = time.perf_counter()
    with _peak_memory() as peak:
        metrics = stages.run(name, context)
    metrics = {
        "seconds": round(time.perf_counter() - began, 3),
        "peak_memory_bytes": peak["bytes"],
        **metrics,
    }
    _seal(directory, metrics)
    emit(events.StageDone(stage=number, directory=directory.name, metrics=metrics))
    return directory.name


def _seal(directory: Path, metrics: dict[str, Any]) -> None:
    """Sync everything a stage wrote, then write the file that says it is complete."""
    for path in (p for p in directory.rglob("*") if p.is_file() and p.stat().st_nlink == 1):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    with (directory / STAGE_FILE).open("w") as file:
        json.dump(metrics, file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """The high-water mark of this process' resident memory within the block, in bytes."""
    peak = {"bytes": 0}
    # Some containers mount /proc read-only: then it is the mark since the process began.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield peak
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            peak["bytes"] = int(line.split()[1]) * 1024


def _failed(error: Exception, stage: str) -> events.Failed:
    """The event a user can act on; what we did not foresee is called a defect, not explained away."""
    if _is_out_of_memory(error):
        error = OutOfMemory(f"Memory ran out: {error}"[:1500], hint=_MEMORY_HINT)
    if isinstance(error, ModelpressError):
        return events.Failed(code=error.code, detail=error.detail, hint=error.hint, stage=stage)
    hint = "This is a defect of Modelpress; the job's log on the worker has the details."
    detail = f"{type(error).__name__}: {error}"[:1500]
    return events.Failed(code="engine_error", detail=detail, hint=hint, stage=stage)


def _is_out_of_memory(error: Exception) -> bool:
    """Torch says so on a GPU by a type of its own, on a CPU by words alone."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
