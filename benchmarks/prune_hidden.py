"""Narrow the states of a language model, by directions and by channels, as cut and refitted.

Usage: .venv/bin/python benchmarks/prune_hidden.py --model DIRECTORY --hidden-size N [--setting NAME ...]
           [--calibration-text FILE] [--evaluation-text FILE] [--calibration-tokens N] [--evaluation-tokens N]

Text is taken and results are judged as prune_criteria.py does. `channels`: those of the states that are largest in the mean square
stay, in place of the strongest directions; all else is the same. Latency is the shortest of a whole window, original and result in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from figures import Figures
from peers.evaluator import Original, Quality, evaluate
from peers.ours_run import run_steps
from peers.texts import evaluation_windows, spread_text
from quality_int8 import facts_of
from torch import Tensor

from workers.engine.architectures.loading import load_model
from workers.engine.calibration.builtin import builtin_text
from workers.engine.prune import hidden

SETTINGS = {
    "channels_alone": {"repair": False},
    "channels": {},
    "directions_alone": {"repair": False},
    "directions": {},
}
BASELINES = {"directions_alone": "channels_alone", "channels": "channels_alone", "directions": "channels"}
MOST = 0.8
"""What a setting's KL may be of its baseline's."""
ROUNDS = 40


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model, tokens = arguments.model, arguments.calibration_tokens
    windows = evaluation_windows(
        model, facts_of(model), arguments.evaluation_text, tokens=arguments.evaluation_tokens
    )
    figures = Figures(
        f"prune_hidden_{model.name}",
        model=model.name,
        evaluation=f"{arguments.evaluation_text.name}, {windows.size} tokens",
        calibration=f"{arguments.calibration_text.name}, {tokens} tokens",
    )
    with tempfile.TemporaryDirectory(prefix="mp-hidden-") as scratch:
        text = Path(scratch) / "calibration.txt"
        spread_text(model, arguments.calibration_text, text, tokens=tokens)
        original = Original(model, windows, Path(scratch))
        found: dict[str, Quality] = {}
        for name in arguments.setting:
            artifact, title = Path(scratch) / name, f"{model.name}_{arguments.hidden_size}_{name}"
            seconds = narrow(name, text, artifact, arguments)
            found[name] = evaluate(artifact, original, int8_activations=False)
            state(figures, title, name, found)
            figures.add(f"{title}_seconds", seconds, "s", compared_with="nothing")
        state_size(figures, model, artifact, torch.from_numpy(windows[:1]))
    figures.exit()


def narrow(name: str, text: Path, artifact: Path, arguments: argparse.Namespace) -> float:
    """Seconds of the one step."""
    sizes = {"hidden_size": arguments.hidden_size, "calibration_tokens": arguments.calibration_tokens}
    job = {
        "model": str(arguments.model),
        "artifact": str(artifact),
        "steps": [{"technique": "prune.hidden"} | SETTINGS[name] | sizes],
        "calibration_text": str(text),
        "threads": arguments.threads,
    }
    with choosing(by_channels=name.startswith("channels")):
        begin = time.monotonic()
        run_steps(job)
        return time.monotonic() - begin


@contextmanager
def choosing(*, by_channels: bool) -> Iterator[None]:
    """The baseline is no option of the technique: its basis is put in the place of the other."""
    directions = hidden.strongest_directions
    if by_channels:
        hidden.strongest_directions = strongest_channels
    try:
        yield
    finally:
        hidden.strongest_directions = directions


def strongest_channels(moment: Tensor, width: int) -> Tensor:
    """Columns of the identity: (hidden, hidden) -> (hidden, width)."""
    return torch.eye(len(moment))[:, moment.diagonal().topk(width).indices].contiguous()


def state(figures: Figures, title: str, name: str, found: dict[str, Quality]) -> None:
    """The setting's figures, held against its baseline's if that was run before it."""
    quality, baseline = found[name], BASELINES.get(name, "")
    against = found.get(baseline)
    floor = None if against is None else f"<= {MOST:g} x {baseline}"
    ok = against is None or quality.kl_mean <= MOST * against.kl_mean
    beside = "the original" if against is None else f"{against.kl_mean:.4f} of {baseline}"
    figures.add(f"{title}_kl", quality.kl_mean, "nats, mean", compared_with=beside, floor=floor, ok=ok)
    of_original = f"{quality.original_perplexity:.2f} of the original"
    figures.add(f"{title}_perplexity", quality.perplexity, "", compared_with=of_original)


@torch.inference_mode()
def state_size(figures: Figures, model: Path, artifact: Path, window: Tensor) -> None:
    """Bytes of the weights, parameters, and the shortest latency of a window, each over the original's."""
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (model, artifact)]
    loaded = [load_model(directory) for directory in (model, artifact)]
    counts = [m.num_parameters() for m in loaded]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for each, m in zip(times, loaded, strict=True):
            begin = time.perf_counter()
            m(window)
            each.append(time.perf_counter() - begin)
    shortest = [min(each) for each in times]
    for what, (before, after) in {"bytes": sizes, "parameters": counts, "latency": shortest}.items():
        figures.add(
            f"{artifact.name}_{what}", after / before, "of the original's", compared_with=f"{before:g}"
        )


def parse_arguments() -> argparse.Namespace:
    """Settings are run in the order of SETTINGS."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="in Hugging Face layout")
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--calibration-text", type=Path, default=builtin_text("calibration"))
    parser.add_argument("--evaluation-text", type=Path, default=builtin_text("evaluation"))
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.setting.sort(key=list(SETTINGS).index)
    return arguments


if __name__ == "__main__":
    main()
