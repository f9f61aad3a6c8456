"""Calibrated int4 quantization on a CUDA GPU of a model of the shape of Llama 3 8B: time, and memory of the GPU.

Usage: python benchmarks/quantize_gpu.py [--blocks 32] [--windows 128] [--length 2048] [--directory SCRATCH]
           [--peer-python PYTHON [--peer-blocks 4]]

Weights are random (bf16, 128,256 tokens of vocabulary) and the built-in text is repeated until it suffices: neither bears
on time or memory, and nothing is said of quality. The time is that of the whole step, from reading the checkpoint to the
last fsync of the result, in a process that has done the same to one block before, so that libraries are loaded and
kernels compiled. The GPU's memory is what torch had reserved of it at most, so what other jobs could not have had; not
the driver's own (some 500 MB).
With an interpreter that has llm-compressor (requirements in benchmarks/peers/requirements), its GPTQ is run on a model of
fewer blocks, and ours on the same: both take blocks one after the other. Of the peer the quantization alone is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figures
from quality_int8 import facts_of
from synthetic_llama import Shape, make_llama

from app.spec.quantize import QuantizeCalibrated
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.text import token_windows
from workers.engine.technique import StepContext, run_step

EIGHT_BILLION = Shape(hidden=4096, inner=14336, keys=1024, blocks=32, vocabulary=128_256, head=128)
MAX_SECONDS = 120
MAX_GPU_GIB = 12
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=EIGHT_BILLION.blocks)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--peer-python", help="an interpreter that has llm-compressor")
    parser.add_argument("--peer-blocks", type=int, default=4)
    parser.add_argument("--directory", type=Path, help="where to put the scratch directory")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU here.")
    step = QuantizeCalibrated(
        bits=4,
        group_size=128,
        calibration_tokens=arguments.windows * arguments.length,
        sequence_length=arguments.length,
    )
    figures = Figures("quantize_gpu", device=torch.cuda.get_device_name())
    with tempfile.TemporaryDirectory(prefix="mp-gpu-", dir=arguments.directory) as scratch:
        here = Path(scratch)
        write_text(here / "text.txt", step.calibration_tokens)
        few = step.model_copy(update={"calibration_tokens": 8 * arguments.length})
        quantize(here, make(here, replace(EIGHT_BILLION, blocks=1, vocabulary=1024)), few)
        whole = replace(EIGHT_BILLION, blocks=arguments.blocks)
        add_floors(figures, quantize(here, make(here, whole), step), about(whole, arguments))
        if arguments.peer_python:
            part = replace(EIGHT_BILLION, blocks=arguments.peer_blocks)
            model = make(here, part)
            peer = run_llmcompressor(here, model, step, arguments.peer_python)
            add_peer(figures, quantize(here, model, step), peer, about(part, arguments))
    sys.exit(figures.missed)


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    seconds: float
    gpu_bytes: int


def about(shape: Shape, arguments: argparse.Namespace) -> str:
    """What was done, in words."""
    return (
        f"{shape.blocks} blocks of the shape of Llama 3 8B, GPTQ int4 g128, "
        f"{arguments.windows} x {arguments.length} tokens, on one {torch.cuda.get_device_name()}"
    )


def add_floors(figures: Figures, cost: Cost, what: str) -> None:
    """State what ours took, against the floors."""
    gib = cost.gpu_bytes / GIB
    figures.add(
        "quantize_gpu_seconds", cost.seconds, "s", compared_with=what,
        floor=f"<= {MAX_SECONDS}", ok=cost.seconds <= MAX_SECONDS,
    )  # fmt: skip
    figures.add(
        "quantize_gpu_memory", gib, "GiB of the GPU", compared_with=what,
        floor=f"<= {MAX_GPU_GIB}", ok=gib <= MAX_GPU_GIB,
    )  # fmt: skip


def add_peer(figures: Figures, ours: Cost, report: dict[str, Any], what: str) -> None:
    """State both sides of a run in turns."""
    theirs = report["parts"]["quantize"]
    named = {"peer": f"llm-compressor GPTQ, {what}", "peer_version": report["versions"]["llmcompressor"]}
    figures.add_against_peer(
        "quantize_gpu_seconds_vs_llmcompressor", ours.seconds, "s", peer_value=theirs["seconds"], **named
    )
    figures.add_against_peer(
        "quantize_gpu_memory_vs_llmcompressor", ours.gpu_bytes / GIB, "GiB of the GPU",
        peer_value=theirs["peak_gpu_bytes"] / GIB, **named,
    )  # fmt: skip


def run_llmcompressor(scratch: Path, model: Path, step: QuantizeCalibrated, python: str) -> dict[str, Any]:
    """Its report on the same model and tokens, by a process of its own."""
    tokens = step.calibration_tokens
    windows = token_windows(
        load_tokenizer(model), scratch / "text.txt", tokens=tokens, length=step.sequence_length
    )
    np.savez(scratch / "windows.npz", windows=windows.numpy())
    job = {
        "model": str(model),
        "windows": str(scratch / "windows.npz"),
        "method": "gptq",
        "bits": step.bits,
        "group_size": step.group_size,
        "artifact": str(scratch / "peer"),
        "dense": "",
        "report": str(scratch / "report.json"),
        "threads": torch.get_num_threads(),
    }
    (scratch / "job.json").write_text(json.dumps(job))
    torch.cuda.empty_cache()
    runner = Path(__file__).parent / "peers" / "llmcompressor_run.py"
    subprocess.run([python, str(runner), "quantize", str(scratch / "job.json")], check=True)
    return dict(json.loads((scratch / "report.json").read_text()))


def write_text(file: Path, nbytes: int) -> None:
    """The built-in text, again and again: the synthetic tokenizer makes a token of each byte."""
    text = builtin_text("calibration").read_text(encoding="utf-8")
    file.write_text(text * (nbytes // len(text) + 1), encoding="utf-8")


def make(scratch: Path, shape: Shape) -> Path:
    """Write a model in the place of the one before."""
    model = scratch / "model"
    shutil.rmtree(model, ignore_errors=True)
    make_llama(model, shape, device="cuda")
    return model


def quantize(scratch: Path, model: Path, step: QuantizeCalibrated) -> Cost:
    """Run the step once and forget what it wrote."""
    target = scratch / "target"
    target.mkdir()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    context = StepContext(
        source=model,
        target=target,
        original=model,
        facts=facts_of(model),
        calibration_text=scratch / "text.txt",
        device="cuda",
        threads=torch.get_num_threads(),
    )
    run_step(step, context)
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return Cost(seconds, torch.cuda.max_memory_reserved())


if __name__ == "__main__":
    main()
