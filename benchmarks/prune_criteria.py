"""Prune a language model by each criterion and each way of sharing out sparsity, against chance and against uniform.

Usage: .venv/bin/python benchmarks/prune_criteria.py --model DIRECTORY [--sparsity 0.3 0.5 0.7] [--setting NAME ...]
           [--calibration-text FILE] [--evaluation-text FILE] [--calibration-tokens N] [--evaluation-tokens N]

All linear layers inside blocks, head and embeddings left as they are. Calibration text is taken from places spread over
its file, the result judged as quantize_vs_peers.py judges: on what was written, in float32, on windows of another text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from figures import Figures
from peers.evaluator import Original, Quality, evaluate
from peers.ours_run import run_steps
from peers.texts import evaluation_windows, spread_text
from quality_int8 import facts_of

from workers.engine.calibration.builtin import builtin_text

CRITERIA = ("random", "magnitude", "gradient", "taylor", "wanda", "sparsegpt")
SETTINGS: dict[str, dict[str, object]] = {
    **{f"{name}_alone": {"criterion": name, "compensate": False} for name in CRITERIA},
    **{name: {"criterion": name} for name in CRITERIA},
    "sensitivity": {"allocation": "sensitivity"},
    "taylor_sensitivity": {"criterion": "taylor", "allocation": "sensitivity"},
}
"""Without compensation, with it, and with sparsity shared out by sensitivity (by sparsegpt, and by taylor)."""
BASELINES = {
    **{f"{name}_alone": "random_alone" for name in CRITERIA[1:]},
    **dict.fromkeys(CRITERIA[1:], "random"),
    "sensitivity": "sparsegpt",
    "taylor_sensitivity": "taylor",
}
MOST = {"random_alone": 0.5, "random": 0.8, "sparsegpt": 1.0, "taylor": 1.0}
"""What a setting's KL may be of its baseline's."""


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    windows = evaluation_windows(
        arguments.model,
        facts_of(arguments.model),
        arguments.evaluation_text,
        tokens=arguments.evaluation_tokens,
    )
    figures = Figures(
        f"prune_criteria_{arguments.model.name}",
        model=arguments.model.name,
        evaluation=f"{arguments.evaluation_text.name}, {windows.size} tokens",
        calibration=f"{arguments.calibration_text.name}, {arguments.calibration_tokens} tokens",
    )
    with tempfile.TemporaryDirectory(prefix="mp-criteria-") as scratch:
        text = Path(scratch) / "calibration.txt"
        tokens = arguments.calibration_tokens
        spread_text(arguments.model, arguments.calibration_text, text, tokens=tokens)
        original = Original(arguments.model, windows, Path(scratch))
        for sparsity in arguments.sparsity:
            found: dict[str, Quality] = {}
            for name in arguments.setting:
                step = SETTINGS[name] | {"sparsity": sparsity, "calibration_tokens": tokens}
                found[name] = pruned(step, text, original, arguments)
                state(figures, f"{arguments.model.name}_{sparsity:g}_{name}", name, found)
    figures.exit()


def pruned(step: dict[str, object], text: Path, original: Original, arguments: argparse.Namespace) -> Quality:
    """What is left of the model after one step of pruning."""
    with tempfile.TemporaryDirectory(prefix="mp-pruned-") as target:
        job = {
            "model": str(arguments.model),
            "artifact": f"{target}/artifact",
            "steps": [{"technique": "prune.calibrated"} | step],
            "calibration_text": str(text),
            "threads": arguments.threads,
        }
        run_steps(job)
        return evaluate(Path(job["artifact"]), original, int8_activations=False)  # type: ignore[arg-type]


def state(figures: Figures, title: str, name: str, found: dict[str, Quality]) -> None:
    """The setting's figures, held against its baseline's if that was run before it."""
    quality, baseline = found[name], BASELINES.get(name, "")
    against = found.get(baseline)
    floor = None if against is None else f"<= {MOST[baseline]:g} x {baseline}"
    ok = against is None or quality.kl_mean <= MOST[baseline] * against.kl_mean
    beside = "the original" if against is None else f"{against.kl_mean:.4f} of {baseline}"
    figures.add(f"{title}_kl", quality.kl_mean, "nats, mean", compared_with=beside, floor=floor, ok=ok)
    of_original = f"{quality.original_perplexity:.2f} of the original"
    figures.add(f"{title}_perplexity", quality.perplexity, "", compared_with=of_original)


def parse_arguments() -> argparse.Namespace:
    """Settings are run in the order of SETTINGS."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="in Hugging Face layout")
    parser.add_argument("--calibration-text", type=Path, default=builtin_text("calibration"))
    parser.add_argument("--evaluation-text", type=Path, default=builtin_text("evaluation"))
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.setting.sort(key=list(SETTINGS).index)
    return arguments


if __name__ == "__main__":
    main()
