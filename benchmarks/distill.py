"""Distil an encoder to half its blocks, and a language model cut by a fifth: what they keep, recover and gain in speed.

Usage: .venv/bin/python benchmarks/distill.py [--encoder DIRECTORY --pairs FILE] [--model DIRECTORY --evaluation-text FILE]
           --training-text FILE [--cached-logits K | --repair-alone] [--threads N]

The encoder is asked how alike two texts are: `--pairs` has JSON lines with two texts that mean the same, `a` and `b`.
Compared with the teacher by rank (Spearman's correlation): of those pairs alone, and of those with as many pairs of
strangers. Speed is processor time of single sentences, in turns. Of the language model, what it loses in ln perplexity
by the cut and has back after training, on a text of another source than the one it was trained on; with
`--cached-logits` it is trained by what the teacher was written down to say, and with `--repair-alone` it is not trained:
what the least squares before training give by themselves is measured. The specs stand in this file; students are
loaded from the written files by transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from quality_int8 import facts_of
from torch.nn import functional

from app.spec.distill import DistillLogits, StudentFromDepthCut
from workers.engine.architectures.block_removal import remove_blocks
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.distill.preparation import student_directory
from workers.engine.distill.texts import stream_text
from workers.engine.technique import StepContext, StepOutcome, run_step

# The clock ends both, and the learning rate follows the clock: as many steps as 18 minutes hold.
ENCODER = DistillLogits(
    student=StudentFromDepthCut(drop_ratio=0.5),
    batch_size=32,
    max_steps=5000,
    max_seconds=1080,
    learning_rate=5e-4,
    hidden_weight=1.0,
    evaluate_every=50,
    patience=100,
)
LANGUAGE_MODEL = DistillLogits(
    student=StudentFromDepthCut(drop_ratio=0.2),
    max_steps=5000,
    max_seconds=1080,
    learning_rate=3e-4,
    evaluate_every=50,
    patience=100,
)
LEAST_CORRELATION, LEAST_SPEEDUP, LEAST_RECOVERED = 0.95, 1.8, 0.5
WINDOWS, WINDOW_TOKENS = 16, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, help="in Hugging Face layout, embeddings by mean pooling")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--model", type=Path, help="a language model in Hugging Face layout")
    parser.add_argument("--evaluation-text", type=Path)
    parser.add_argument("--training-text", type=Path, required=True)
    parser.add_argument("--cached-logits", type=int)
    parser.add_argument("--repair-alone", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    missed = False
    if arguments.encoder:
        missed |= measure_encoder(arguments.encoder, arguments.pairs, arguments.training_text).missed
    if arguments.model and arguments.repair_alone:
        measure_repair(arguments.model, arguments.evaluation_text, arguments.training_text)
    elif arguments.model:
        spec = LANGUAGE_MODEL.model_copy(update={"cached_logits": arguments.cached_logits})
        missed |= measure_model(
            spec, arguments.model, arguments.evaluation_text, arguments.training_text
        ).missed
    sys.exit(missed)


def measure_encoder(teacher: Path, pairs: Path, training_text: Path) -> Figures:
    """Cut and train the encoder, and compare similarities."""
    figures = Figures(keep_as=f"distill_{teacher.name}", spec=ENCODER.model_dump_json())
    texts = [json.loads(line) for line in pairs.read_text().splitlines()]
    sides = [pair["a"] for pair in texts], [pair["b"] for pair in texts]
    with tempfile.TemporaryDirectory(prefix="mp-distill-") as scratch:
        cut, student = Path(scratch, "cut"), Path(scratch, "student")
        state_training(figures, distill(ENCODER, teacher, training_text, cut, student))
        expected = similarities(teacher, *sides)
        for name, directory in (("cut", cut), ("distilled", student)):
            ours = similarities(directory, *sides)
            for kind, count in (("pairs", len(texts)), ("pairs_and_strangers", 2 * len(texts))):
                is_bar = name == "distilled" and kind == "pairs_and_strangers"
                value = rank_correlation(ours[:count], expected[:count])
                figures.add(
                    f"distill_encoder_{name}_{kind}",
                    value,
                    "Spearman",
                    compared_with=f"{teacher.name}'s similarities of {count} pairs from {pairs.name}",
                    floor=f">= {LEAST_CORRELATION}" if is_bar else None,
                    ok=not is_bar or value >= LEAST_CORRELATION,
                )
        speedup = times_faster(teacher, student, sides[0][:100])
    figures.add(
        "distill_encoder_speedup",
        speedup,
        "× fewer processor seconds",
        compared_with=f"{teacher.name}, sentence by sentence",
        floor=f">= {LEAST_SPEEDUP}",
        ok=speedup >= LEAST_SPEEDUP,
    )
    return figures


def measure_model(spec: DistillLogits, teacher: Path, evaluation_text: Path, training_text: Path) -> Figures:
    """Cut and train the language model, and compare perplexities."""
    name = f"distill_{teacher.name}" if spec.cached_logits is None else f"distill_{teacher.name}_cached"
    figures = Figures(keep_as=name, spec=spec.model_dump_json())
    with tempfile.TemporaryDirectory(prefix="mp-distill-") as scratch:
        cut, student = Path(scratch, "cut"), Path(scratch, "student")
        state_training(figures, distill(spec, teacher, training_text, cut, student))
        whole, lost, left = (
            ln_perplexity(directory, evaluation_text) for directory in (teacher, cut, student)
        )
    said = f"{teacher.name}, {WINDOWS} x {WINDOW_TOKENS} tokens of {evaluation_text.name}"
    figures.add("distill_lm_original", whole, "ln perplexity", compared_with=said)
    figures.add("distill_lm_cut", lost, "ln perplexity", compared_with=said)
    figures.add("distill_lm_distilled", left, "ln perplexity", compared_with=said)
    recovered = (lost - left) / (lost - whole)
    figures.add(
        "distill_lm_recovered",
        recovered,
        "of the ln perplexity lost by the cut",
        compared_with=said,
        floor=f">= {LEAST_RECOVERED}",
        ok=recovered >= LEAST_RECOVERED,
    )
    return figures


def measure_repair(teacher: Path, evaluation_text: Path, training_text: Path) -> None:
    """Cut the language model with and without repair, by the same blocks, and compare perplexities."""
    figures = Figures(keep_as=f"distill_{teacher.name}_repair", spec=LANGUAGE_MODEL.model_dump_json())
    with tempfile.TemporaryDirectory(prefix="mp-distill-") as scratch:
        context = context_of(teacher, training_text, Path(scratch, "student"))
        text = stream_text(
            LANGUAGE_MODEL, training_text, load_tokenizer(teacher), context.facts, seed=context.seed
        )
        began = time.process_time()
        with student_directory(LANGUAGE_MODEL, context, text, Path(scratch)) as (student, dropped):
            spent = time.process_time() - began
            cut = Path(scratch, "cut")
            remove_blocks(teacher, cut, dropped, max_shard_bytes=2**33, progress=lambda *_: None)
            whole, lost, left = (
                ln_perplexity(directory, evaluation_text) for directory in (teacher, cut, student)
            )
    blocks = f"without blocks {' '.join(map(str, dropped))}"
    said = f"{blocks}; {WINDOWS} x {WINDOW_TOKENS} tokens of {evaluation_text.name}"
    figures.add("distill_repair_processor_seconds", spent, "s, choosing the blocks too", compared_with=said)
    for name, value in (("original", whole), ("cut", lost), ("repaired", left)):
        figures.add(f"distill_lm_{name}", value, "ln perplexity", compared_with=said)
    recovered = (lost - left) / (lost - whole)
    figures.add(
        "distill_lm_repair_recovered", recovered, "of the ln perplexity lost by the cut", compared_with=said
    )


def context_of(teacher: Path, text: Path, target: Path) -> StepContext:
    return StepContext(
        source=teacher,
        target=target,
        original=teacher,
        facts=facts_of(teacher),
        training_text=text,
        threads=torch.get_num_threads(),
        progress=lambda share, message: print(f"{share:.3f} {message}", file=sys.stderr),
    )


def distill(spec: DistillLogits, teacher: Path, text: Path, cut: Path, student: Path) -> dict[str, Any]:
    """Write the student, and beside it what it was before training. Returns how the training went."""
    student.mkdir()
    wall, processor = time.perf_counter(), time.process_time()
    outcome: StepOutcome = run_step(spec, context_of(teacher, text, student))
    seconds = time.perf_counter() - wall, time.process_time() - processor
    dropped = [int(block) for block in str(outcome.metrics["blocks_removed"]).split()]
    cut.mkdir()
    remove_blocks(teacher, cut, dropped, max_shard_bytes=2**33, progress=lambda *_: None)
    return outcome.metrics | {"seconds": seconds[0], "processor_seconds": seconds[1]}


def state_training(figures: Figures, metrics: dict[str, Any]) -> None:
    said = f"{metrics['steps']} steps, ended by {metrics['stopped_by']}, without blocks {metrics['blocks_removed']}"
    for name, unit in (("seconds", "s"), ("processor_seconds", "s"), ("held_out_loss_before", "loss"), ("held_out_loss_after", "loss")):  # fmt: skip
        figures.add(f"distill_{name}", metrics[name], unit, compared_with=said)
    if metrics["cache_bytes_per_token"] is not None:
        figures.add("distill_cache", metrics["cache_bytes_per_token"], "bytes a token", compared_with=said)


@torch.inference_mode()
def embeddings(directory: Path, texts: list[str]) -> torch.Tensor:
    """Mean of the last hidden states, at length one: (texts, width)."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        batch = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        mask = batch["attention_mask"][..., None]
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found |= dict(zip(chosen, functional.normalize(pooled, dim=-1), strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


def similarities(directory: Path, left: list[str], right: list[str]) -> torch.Tensor:
    """Cosines of each text with its own partner, then of each with a stranger drawn by seed: (2 · texts,)."""
    a, b = embeddings(directory, left + right).split(len(left))
    strangers = torch.randperm(len(left), generator=torch.Generator().manual_seed(0))
    return torch.cat([(a * b).sum(1), (a * b[strangers]).sum(1)])


def rank_correlation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Spearman's: the correlation of the ranks; among thousands of cosines ties do not matter."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (ours, theirs)])
    return float(torch.corrcoef(ranks)[0, 1])


@torch.inference_mode()
def times_faster(teacher: Path, student: Path, texts: list[str]) -> float:
    """Processor time of the teacher over the student's: the median over texts, one thread, in turns."""
    models, tokenizer = [load_model(directory) for directory in (teacher, student)], load_tokenizer(teacher)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = []
    for text in texts:
        batch, spent = tokenizer([text], return_tensors="pt"), []
        for model in models:
            model(**batch)
            began = time.process_time()
            for _ in range(3):
                model(**batch)
            spent.append(time.process_time() - began)
        ratios.append(spent[0] / spent[1])
    torch.set_num_threads(threads)
    return statistics.median(ratios)


@torch.inference_mode()
def ln_perplexity(
    directory: Path, text: Path, *, windows: int = WINDOWS, length: int = WINDOW_TOKENS
) -> float:
    """Mean over windows, evenly spread over the text, of the cross-entropy of each token but the first."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    length = min(length, model.config.max_position_embeddings)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    losses = []
    for number in range(windows):
        start = number * (len(ids) - length) // max(1, windows - 1)
        window = ids[start : start + length]
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(float(functional.cross_entropy(logits, window[1:])))
    return statistics.fmean(losses)


if __name__ == "__main__":
    main()
