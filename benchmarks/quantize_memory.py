"""Peak memory of calibrated quantization at the shape of an 8B model, and how time and memory grow with the work.

Usage: .venv/bin/python benchmarks/quantize_memory.py [--blocks 1] [--tokens 4096] [--only peak|growth]
           [--directory SCRATCH]

Peak: blocks of the shape of an 8B Llama (hidden 4096, inner 14336, keys 1024; bf16, random), int4, 128 inputs a scale.
One block is enough: blocks are done one after the other, and memory holds one; two, the default, show that. Tokens are
few, 8 x 512, to keep it at minutes: statistics have the size of a layer's inputs squared however many tokens there are,
and states between blocks lie on disk. The budget is 2.5 GiB. What a plan says of the peak stands beside what it was.
Growth: Llamas of growing size on the same tokens, and one of them on growing numbers of tokens; docs/images/
quantize_growth.svg is drawn from it.
Each run is a process of its own; its time is that of the whole step, its peak memory (VmHWM) holds the imports too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import Figures
from growth_plot import Run, draw
from quality_int8 import facts_of
from synthetic_llama import Shape, make_llama

from app.spec.compression import CompressionSpec
from app.spec.plan import plan_job
from workers.engine.calibration.builtin import builtin_text

MAX_PEAK_GIB = 2.5
MAX_PLAN_ERROR = 0.2
# 8B: of Llama 3 but for its vocabulary, which calibration never reads whole.
EIGHT_BILLION = Shape(hidden=4096, inner=14336, keys=1024, blocks=2, head=128)
TOKENS = 4096
GROWING = (
    Shape(hidden=256, inner=768, keys=128, blocks=4),
    Shape(hidden=384, inner=1152, keys=128, blocks=6),
    Shape(hidden=512, inner=1536, keys=128, blocks=8),
    Shape(hidden=768, inner=2304, keys=256, blocks=8),
    Shape(hidden=1024, inner=3072, keys=256, blocks=10),
)
GROWING_TOKENS = (2048, 4096, 8192, 16_384, 32_768)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "quantize_growth.svg"
OURS = Path(__file__).parent / "peers" / "ours_run.py"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=EIGHT_BILLION.blocks)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="calibration tokens of the peak's run")
    parser.add_argument("--only", choices=("peak", "growth"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where to put the scratch directory")
    arguments = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory(prefix="mp-memory-", dir=arguments.directory) as scratch:
        if arguments.only != "growth":
            figures.append(measure_peak(Path(scratch), arguments))
        if arguments.only != "peak":
            figures.append(measure_growth(Path(scratch), arguments))
    sys.exit(any(each.missed for each in figures))


def measure_peak(scratch: Path, arguments: argparse.Namespace) -> Figures:
    """The peak at the shape of an 8B model, against the budget."""
    figures = Figures("quantize_memory_8b")
    shape = Shape(4096, 14336, 1024, arguments.blocks, head=128)
    run = quantize(scratch, shape, tokens=arguments.tokens, group_size=128, threads=arguments.threads)
    about = f"{shape.blocks} blocks of an 8B Llama in bf16, int4 g128, {arguments.tokens} calibration tokens"
    peak = run.peak_rss_bytes / 2**30
    figures.add(
        "quantize_memory_8b_peak_rss",
        peak,
        "GiB",
        compared_with=about,
        floor=f"<= {MAX_PEAK_GIB}",
        ok=peak <= MAX_PEAK_GIB,
    )
    figures.add("quantize_memory_8b_seconds_per_block", run.seconds / shape.blocks, "s", compared_with=about)
    figures.add(
        "quantize_memory_8b_processor_seconds_per_block",
        run.processor_seconds / shape.blocks,
        "s, user + system",
        compared_with=about,
    )
    add_plan(figures, "quantize_memory_8b", [run])
    return figures


def measure_growth(scratch: Path, arguments: argparse.Namespace) -> Figures:
    """Time and memory against parameters and against tokens; draws the picture."""
    figures = Figures("quantize_growth")
    sizes = [
        quantize(scratch, shape, tokens=TOKENS, group_size=64, threads=arguments.threads) for shape in GROWING
    ]
    lengths = [
        quantize(scratch, GROWING[1], tokens=tokens, group_size=64, threads=arguments.threads)
        for tokens in GROWING_TOKENS
    ]
    for series, runs in (("parameters", sizes), ("tokens", lengths)):
        for run in runs:
            about = (
                f"{run.parameters / 1e6:.1f} M weights in blocks, {run.tokens} calibration tokens, int4 g64"
            )
            key = run.parameters if series == "parameters" else run.tokens
            name = f"quantize_growth_{series}_{key}"
            figures.add(f"{name}_seconds", run.seconds, "s", compared_with=about)
            figures.add(
                f"{name}_processor_seconds", run.processor_seconds, "s, user + system", compared_with=about
            )
            figures.add(f"{name}_peak_rss", run.peak_rss_bytes / MIB, "MiB", compared_with=about)
    add_plan(figures, "quantize_growth", sizes + lengths)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(sizes, lengths))
    return figures


def add_plan(figures: Figures, name: str, runs: list[Run]) -> None:
    """The plan's peak over what was measured: the lowest and the highest of some runs."""
    ratios = [run.planned_bytes / run.peak_rss_bytes for run in runs]
    for which, ratio in (("lowest", min(ratios)), ("highest", max(ratios))):
        figures.add(
            f"{name}_plan_{which}",
            ratio,
            "ratio",
            compared_with=f"the measured peak, {len(runs)} runs",
            floor=f"within {MAX_PLAN_ERROR:.0%}",
            ok=abs(ratio - 1) <= MAX_PLAN_ERROR,
        )


def quantize(scratch: Path, shape: Shape, *, tokens: int, group_size: int, threads: int) -> Run:
    """Quantize a synthetic model in a process of its own."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        here = Path(directory)
        make_llama(here / "model", shape)
        step = {
            "technique": "quantize.calibrated",
            "bits": 4,
            "group_size": group_size,
            "calibration_tokens": tokens,
        }
        job: dict[str, Any] = {
            "model": str(here / "model"),
            "steps": [step],
            "calibration_text": str(builtin_text("calibration")),
            "artifact": str(here / "artifact"),
            "report": str(here / "report.json"),
            "threads": threads,
        }
        (here / "job.json").write_text(json.dumps(job))
        subprocess.run([sys.executable, str(OURS), str(here / "job.json")], check=True)
        measured = json.loads((here / "report.json").read_text())["parts"]["quantize"]
        spec = CompressionSpec.model_validate({"steps": [step]})
        stages = plan_job(spec, facts_of(here / "model")).stages
    planned = next(stage.peak_memory_bytes for stage in stages if "calibrated" in stage.name)
    return Run(parameters=shape.block_parameters, tokens=tokens, planned_bytes=planned, **measured)


if __name__ == "__main__":
    main()
