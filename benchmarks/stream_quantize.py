"""Quantize a synthetic sharded bf16 checkpoint to int4: peak memory, and speed against dd on the same disk.

Usage: .venv/bin/python benchmarks/stream_quantize.py [--gib 8] [--directory SCRATCH]

dd reads the same shards and writes as many bytes as the result has, with an fsync, as our writer does. Inputs are
dropped from the page cache before each run. Ours runs in a process of its own; imports are not in its time, but are
in its peak memory (VmHWM). Needs about 1.7 times the checkpoint's size of free disk and removes what it made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from figures import Figures

from app.spec.base import Family
from app.spec.facts import ModelFacts, TensorFact
from app.spec.quantize import QuantizeWeights
from workers.engine.checkpoint import Checkpoint, CheckpointWriter, write_config
from workers.engine.technique import StepContext, run_step

MAX_PEAK_MIB = 700
MIN_SPEED = 0.3
HIDDEN, KEYS, INNER, VOCABULARY = 4096, 1024, 14336, 32000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the synthetic checkpoint")
    parser.add_argument("--directory", type=Path, help="where to put the scratch directory")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        quantize_in_this_process(*arguments.child)
        return
    with tempfile.TemporaryDirectory(prefix="mp-stream-", dir=arguments.directory) as scratch:
        source = Path(scratch) / "source"
        make_checkpoint(source, int(arguments.gib * 2**30))
        figures = measure(source, Path(scratch))
    figures.exit()


def measure(source: Path, scratch: Path) -> Figures:
    """dd before and after ours, so that a disk that changes its mind shows."""
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shape = f"{size / 2**30:.1f} GiB bf16 in {len(list(source.glob('*.safetensors')))} shards, int4 g128"
    absmax = run_child(source, scratch / "absmax", "absmax")
    written = sum(file.stat().st_size for file in (scratch / "absmax").glob("*.safetensors"))
    shutil.rmtree(scratch / "absmax")
    dd_seconds = run_dd(source, scratch / "dd.out", written)
    again = run_child(source, scratch / "absmax", "absmax")
    shutil.rmtree(scratch / "absmax")
    mse = run_child(source, scratch / "mse", "mse")

    figures = Figures()
    peak = max(absmax["peak_mib"], again["peak_mib"])
    ours = (absmax["seconds"] + again["seconds"]) / 2
    speed = dd_seconds / ours
    figures.add(
        "stream_quantize_peak_rss",
        peak,
        "MiB",
        compared_with=shape,
        floor=f"<= {MAX_PEAK_MIB}",
        ok=peak <= MAX_PEAK_MIB,
    )
    figures.add(
        "stream_quantize_speed",
        speed,
        "ratio",
        compared_with=f"dd: {size} bytes read, {written} written and synced in {dd_seconds:.1f} s; ours {ours:.1f} s",
        floor=f">= {MIN_SPEED}",
        ok=speed >= MIN_SPEED,
    )
    figures.add("stream_quantize_throughput", size / ours / 2**20, "MiB/s of input", compared_with=shape)
    figures.add(
        "stream_quantize_mse_time",
        mse["seconds"] / ours,
        "ratio",
        compared_with=f"absmax scales, {ours:.1f} s; MSE-searched scales {mse['seconds']:.1f} s",
    )
    figures.add("stream_quantize_mse_peak_rss", mse["peak_mib"], "MiB", compared_with=shape)
    return figures


def run_child(source: Path, target: Path, search: str) -> dict[str, float]:
    drop_from_cache(source)
    command = [sys.executable, __file__, "--child", str(source), str(target), search]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def quantize_in_this_process(source: str, target: str, search: str) -> None:
    """The child: quantize, then print its time and its peak memory."""
    step = QuantizeWeights.model_validate({"bits": 4, "group_size": 128, "scale_search": search})
    context = StepContext(
        source=Path(source),
        target=Path(target),
        original=Path(source),
        facts=facts_of(Path(source)),
        threads=os.cpu_count() or 1,
    )
    begin = time.perf_counter()
    run_step(step, context)
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_mib": peak / 1024}))


def facts_of(directory: Path) -> ModelFacts:
    tensors = tuple(Checkpoint.open(directory).facts())
    return ModelFacts(
        format="safetensors",
        architecture="LlamaForCausalLM",
        family=Family.CAUSAL_LM,
        parameters=sum(tensor.elements for tensor in tensors),
        dtype="BF16",
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        hidden_size=HIDDEN,
        num_blocks=sum(tensor.name.endswith("q_proj.weight") for tensor in tensors),
        vocab_size=VOCABULARY,
        max_positions=4096,
        tensors=tensors,
    )


def run_dd(source: Path, output: Path, size: int) -> float:
    """Seconds to read all shards and to write and sync `size` bytes."""
    drop_from_cache(source)
    block = 4 * 2**20
    commands = [
        ["dd", f"if={file}", "of=/dev/null", f"bs={block}"] for file in sorted(source.glob("*.safetensors"))
    ]
    commands.append(
        ["dd", "if=/dev/zero", f"of={output}", f"bs={block}", f"count={-(-size // block)}", "conv=fsync"]
    )
    begin = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    output.unlink()
    return seconds


def drop_from_cache(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_checkpoint(directory: Path, size: int) -> None:
    """A Llama-shaped checkpoint of about `size` bytes, in shards of 2 GB, with Gaussian weights."""
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    outside = sum(2 * rows * columns for rows, columns in shapes.values())
    blocks = max(1, round((size - outside) / sum(2 * rows * columns for rows, columns in LAYER.values())))
    for block in range(blocks):
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in LAYER.items()}
    facts = [TensorFact(name=f"{name}.weight", dtype="BF16", shape=shape) for name, shape in shapes.items()]
    # One random slab is enough: neither time nor memory depends on the values.
    noise = (0.02 * torch.randn(2**25, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    with CheckpointWriter(directory, facts, 2_000_000_000) as writer:
        for fact in facts:
            rows, columns = fact.shape
            for start in range(0, rows, 1024):
                part = min(1024, rows - start)
                writer.write_rows(fact.name, start, noise[: part * columns].view(part, columns))
    write_config(directory, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


if __name__ == "__main__":
    main()
