"""Put everything that was done and measured into one report, as data and as a page that needs nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts
from app.spec.report import Report, StepReport
from workers.engine.measure.acceptance import limits, verdict
from workers.engine.measure.coverage import compose
from workers.engine.measure.flags import Facts, flags
from workers.engine.measure.page import render
from workers.engine.measure.results import Evaluated
from workers.engine.measure.windows import kind_of

_LIBRARIES = ("torch", "transformers", "compressed-tensors", "onnxruntime", "numpy")


def build_report(  # noqa: PLR0913 - a report is the place where everything comes together
    *,
    job_id: str,
    model_name: str,
    facts: ModelFacts,
    spec: CompressionSpec,
    evaluated: Evaluated,
    steps: tuple[StepReport, ...],
    stage_seconds: Mapping[str, float],
    device: str,
    threads: int,
) -> Report:
    """Judge what was measured by the limits of the spec and say everything a reader must know.

    `facts` are those of the model as uploaded; `stage_seconds` has the stages before this one.
    """
    found = flags(Facts(facts, spec, evaluated, steps))
    against = limits(spec.acceptance, evaluated, kind_of(facts))
    is_gguf = facts.format == "gguf"
    return Report(
        job_id=job_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        modelpress=importlib.metadata.version("modelpress"),
        machine=describe_machine(device=device, threads=threads),
        model_name=model_name,
        architecture=facts.architecture,
        family=facts.family.value,
        spec=spec,
        verdict=verdict(against, found, evaluated),
        flags=found,
        limits=against,
        original=evaluated.original,
        result=evaluated.result,
        comparison=evaluated.comparison,
        evaluation_text=evaluated.text,
        evaluation_images=evaluated.images,
        samples=evaluated.verification.samples,
        uploaded_bytes=facts.weight_bytes if is_gguf else None,
        uploaded_dtype=facts.dtype if is_gguf else None,
        coverage=compose(facts, steps),
        steps=steps,
        stage_seconds=dict(stage_seconds),
    )


def render_html(report: Report) -> str:
    """The report as one HTML page without scripts or anything to fetch."""
    page: str = render(report)
    return page


def describe_machine(*, device: str, threads: int) -> dict[str, Any]:
    """The processor, memory, device and library versions that the figures belong to."""
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if device != "cpu":
        import torch

        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
