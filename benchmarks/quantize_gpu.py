"""Calibrated int4 quantization on a CUDA GPU of a model of the shape of Llama 3 8B: time, and memory of the GPU.

Usage: python benchmarks/quantize_gpu.py [--blocks 32] [--windows 128] [--length 2048] [--directory SCRATCH]

Weights are random (bf16, 128,256 tokens of vocabulary) and the built-in text is repeated until it suffices: neither bears
on time or memory, and nothing is said of quality. The time is that of the whole step, from reading the checkpoint to the
last fsync of the result, in a process that has done the same to one block before, so that libraries are loaded and
kernels compiled. The GPU's memory is what torch had reserved of it at most, so what other jobs could not have had; not
the driver's own (some 500 MB).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from figures import Figures
from quality_int8 import facts_of
from synthetic_llama import Shape, make_llama

from app.spec.quantize import QuantizeCalibrated
from workers.engine.calibration.builtin import builtin_text
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
    with tempfile.TemporaryDirectory(prefix="mp-gpu-", dir=arguments.directory) as scratch:
        here = Path(scratch)
        write_text(here / "text.txt", step.calibration_tokens)
        warm = replace(EIGHT_BILLION, blocks=1, vocabulary=1024)
        run(here, warm, step.model_copy(update={"calibration_tokens": 8 * arguments.length}))
        shape = replace(EIGHT_BILLION, blocks=arguments.blocks)
        seconds, reserved = run(here, shape, step)
    figures = Figures("quantize_gpu", device=torch.cuda.get_device_name())
    about = (
        f"{shape.blocks} blocks of the shape of Llama 3 8B, GPTQ int4 g128, "
        f"{arguments.windows} x {arguments.length} tokens, on one {torch.cuda.get_device_name()}"
    )
    figures.add(
        "quantize_gpu_seconds", seconds, "s", compared_with=about,
        floor=f"<= {MAX_SECONDS}", ok=seconds <= MAX_SECONDS,
    )  # fmt: skip
    figures.add(
        "quantize_gpu_memory", reserved / GIB, "GiB of the GPU", compared_with=about,
        floor=f"<= {MAX_GPU_GIB}", ok=reserved / GIB <= MAX_GPU_GIB,
    )  # fmt: skip
    sys.exit(figures.missed)


def write_text(file: Path, nbytes: int) -> None:
    """The built-in text, again and again: the synthetic tokenizer makes a token of each byte."""
    text = builtin_text("calibration").read_text(encoding="utf-8")
    file.write_text(text * (nbytes // len(text) + 1), encoding="utf-8")


def run(scratch: Path, shape: Shape, step: QuantizeCalibrated) -> tuple[float, int]:
    """Quantize a synthetic model: seconds, and bytes of the GPU that were reserved at most."""
    model, target = scratch / "model", scratch / "target"
    began = time.monotonic()
    make_llama(model, shape, device="cuda")
    print(f"made in {time.monotonic() - began:.1f} s", flush=True)
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
        progress=lambda share, message: (
            print(f"{time.monotonic() - began:8.2f} s {share:.3f} {message}", flush=True) if share else None
        ),
    )
    run_step(step, context)
    seconds = time.monotonic() - began
    shutil.rmtree(model)
    shutil.rmtree(target)
    return seconds, torch.cuda.max_memory_reserved()


if __name__ == "__main__":
    main()
