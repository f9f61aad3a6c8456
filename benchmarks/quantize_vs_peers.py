"""Quantize language models by Modelpress and by its peers, on the same text, bits and threads: quality, time, memory.

Usage: .venv/bin/python benchmarks/quantize_vs_peers.py --model DIRECTORY [--model DIRECTORY ...]
           [--calibration-text FILE] [--evaluation-text FILE] [--case int4 ...] [--peer NAME ...] [--ours FILE]
           [--reuse-peers]

Each peer runs in an environment of its own, made on first use (peers/environments.py). All linear layers inside blocks
are quantized, head and embeddings left as they are, symmetric, 64 inputs a scale (32 where 64 does not divide a layer's
inputs), calibrated on the same 64 x 512 tokens (128 x 256 for a model that takes no more). One evaluator judges what
each wrote, reloaded, in float32 (peers/job.py says how). Our settings stand in our_quantization.json.

Seconds and processor seconds (user + system) of a peer are those of its quantization alone, ours those of the whole step
with reading and writing. Peak memory is VmHWM of a process of its own. Ours runs before and after the peer whose time
has a floor, and its mean counts. With --reuse-peers, what an earlier run of the same job left is taken for a peer's
result, its seconds with it; `reused` then says so in the figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from figures import Figures
from peers.catalogue import CASES, OUR_SETTINGS, PEER_METHODS, QUANTIZATION, Case, our_settings
from peers.comparison import TIMED_AGAINST, compare, compare_best, describe, mean_of
from peers.environments import cache_directory
from peers.evaluator import Original
from peers.runs import Outcome, PeerFailed, Subject, run_ours, run_peer
from peers.texts import calibration_windows, digest, evaluation_windows, spread_text
from quality_int8 import facts_of

from workers.engine.calibration.builtin import builtin_text


def main() -> None:
    run(__doc__ or "", QUANTIZATION, OUR_SETTINGS, figures="quantize_vs_peers")


def run(description: str, cases: tuple[str, ...], ours: Path, *, figures: str) -> None:
    """Carry out the cases of the command line, keep their figures under this name, and exit with 1 if a floor is missed."""
    arguments = parse_arguments(description, cases, ours, work=figures)
    torch.set_num_threads(arguments.threads)
    missed = False
    for model in arguments.model:
        subject = prepare(model, arguments)
        for name in arguments.case:
            missed |= measure(subject, CASES[name], arguments, name=figures).missed
    sys.exit(missed)


def parse_arguments(description: str, cases: tuple[str, ...], ours: Path, *, work: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers = [name for name, method in PEER_METHODS.items() if set(method.cases) & set(cases)]
    parser.add_argument("--model", type=Path, action="append", required=True, help="in Hugging Face layout")
    parser.add_argument("--calibration-text", type=Path, default=builtin_text("calibration"))
    parser.add_argument("--evaluation-text", type=Path, default=builtin_text("evaluation"))
    parser.add_argument("--calibration-tokens", type=int, default=64 * 512)
    parser.add_argument("--evaluation-tokens", type=int, default=16 * 1024)
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--peer", nargs="*", choices=peers, default=peers)
    parser.add_argument("--ours", type=Path, default=ours, help="settings of ours (peers/catalogue.py)")
    parser.add_argument(
        "--reuse-peers", action="store_true", help="take results of earlier runs for the peers'"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where artifacts are kept; default: below --cache")
    parser.add_argument(
        "--cache", type=Path, default=cache_directory(), help="where the peers' environments are"
    )
    arguments = parser.parse_args()
    arguments.work = arguments.work or arguments.cache / work
    return arguments


def prepare(model: Path, arguments: argparse.Namespace) -> Subject:
    """Cut both texts into windows and run the original on those it is judged on."""
    work = arguments.work / model.name
    work.mkdir(parents=True, exist_ok=True)
    facts = facts_of(model)
    text, windows = work / "calibration.txt", work / "calibration.npz"
    spread_text(model, arguments.calibration_text, text, tokens=arguments.calibration_tokens)
    tokens = calibration_windows(model, facts, text, windows, tokens=arguments.calibration_tokens)
    held_out = evaluation_windows(model, facts, arguments.evaluation_text, tokens=arguments.evaluation_tokens)
    inputs = [fact.shape[1] for fact in facts.tensors if len(fact.shape) == 2 and "_proj" in fact.name]
    return Subject(
        name=model.name,
        model=model,
        facts=facts,
        group_size=next(size for size in (64, 32) if all(length % size == 0 for length in inputs)),
        calibration_text=text,
        calibration_windows=windows,
        windows_digest=digest(tokens),
        original=Original(model, held_out, work),
        work=work,
        cache=arguments.cache,
        threads=arguments.threads,
    )


def measure(subject: Subject, case: Case, arguments: argparse.Namespace, *, name: str) -> Figures:
    """All chosen methods of one case on one model, and their figures."""
    title = f"{subject.name}_{case.title(subject.group_size)}"
    figures = Figures(
        f"{name}_{title}",
        model=subject.name,
        evaluation=f"{arguments.evaluation_text.name}, {subject.original.windows.size} tokens",
        calibration=f"{arguments.calibration_text.name}, {arguments.calibration_tokens} tokens",
    )
    ours = {name: run_ours(subject, case, s) for name, s in our_settings(arguments.ours, case).items()}
    theirs = run_peers(subject, case, arguments)
    timed = next((outcome for name, outcome in theirs.items() if name in TIMED_AGAINST), None)
    if "fast" in ours and timed is not None and not timed.reused:
        ours["fast"] = mean_of(
            ours["fast"], run_ours(subject, case, our_settings(arguments.ours, case)["fast"])
        )
    for outcome in (*ours.values(), *theirs.values()):
        describe(figures, title, outcome)
    for outcome in theirs.values():
        for setting, mine in ours.items():
            floored = PEER_METHODS[outcome.name].against == setting
            compare(figures, title, mine, outcome, case=case.name if floored else None)
    if case.name in ("int3", "int2") and ours and theirs:
        compare_best(figures, title, list(ours.values()), list(theirs.values()))
    return figures


def run_peers(subject: Subject, case: Case, arguments: argparse.Namespace) -> dict[str, Outcome]:
    """The chosen methods that do this case, by name. One that fails is named on stderr and left out."""
    methods = [PEER_METHODS[name] for name in arguments.peer if case.name in PEER_METHODS[name].cases]
    outcomes: dict[str, Outcome] = {}
    for method in methods:
        try:
            outcomes[method.name] = run_peer(subject, case, method, reuse=arguments.reuse_peers)
        except PeerFailed as failure:
            print(f"{method.name} on {subject.name}, {case.name}: {failure}", file=sys.stderr)
    return outcomes


if __name__ == "__main__":
    main()
