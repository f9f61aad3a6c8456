"""Our side, measured as the peers are: one step in a process of its own, seconds and peak memory kept in a report.

All of the step is timed, from reading the checkpoint to the last fsync of the result; of peers, the quantization alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from peers.job import Meter  # noqa: E402
from quality_int8 import facts_of  # noqa: E402

from app.spec.compression import CompressionSpec  # noqa: E402
from workers.engine.technique import StepContext, run_step  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "job", type=Path, help="JSON of model, steps, calibration_text, artifact, report and threads"
    )
    job = json.loads(parser.parse_args().job.read_text())
    torch.set_num_threads(job["threads"])
    meter = Meter()
    with meter.part("quantize"):
        run_steps(job)
    versions = {name: version(name) for name in ("torch", "transformers")}
    Path(job["report"]).write_text(json.dumps({"parts": meter.parts, "versions": versions}, indent=1))


def run_steps(job: dict[str, Any]) -> None:
    """Each step on what the one before left, the last into the artifact's directory."""
    original, artifact = Path(job["model"]), Path(job["artifact"])
    source, facts = original, facts_of(original)
    steps = CompressionSpec.model_validate({"steps": job["steps"]}).steps
    for number, step in enumerate(steps, start=1):
        target = artifact if number == len(steps) else artifact.with_name(f"step-{number}")
        target.mkdir(parents=True)
        context = StepContext(
            source=source,
            target=target,
            original=original,
            facts=facts,
            calibration_text=Path(job["calibration_text"]),
            threads=job["threads"],
        )
        run_step(step, context)
        source = target


if __name__ == "__main__":
    main()
