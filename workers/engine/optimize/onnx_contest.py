"""Judge the variants of a graph: does each give PyTorch's outputs, and how fast is it, all of them in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.windows import longest_window, model_windows
from workers.engine.technique import StepContext

_CHECKED_WINDOWS = 4
_CHECKED_TOKENS = 64
_TIMED_TOKENS = 128
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
_WARM_UP_ROUNDS = 2
_MOST_ROUNDS = 30
_CONTEST_SECONDS = 6.0
# A slow or busy machine gets fewer rounds, but never so few that one interruption decides.
_FEWEST_ROUNDS = 5
# Threads that the last model left spinning go to sleep before the next one's turn.
_PAUSE_SECONDS = 0.002

Feed = dict[str, NDArray[np.int64]]
Times = Mapping[str, tuple[float, ...]]
"""Milliseconds of each timed round, by the name of what ran."""


@dataclass(frozen=True)
class Probe:
    """Tokens to compare outputs on, the outputs PyTorch gives, and one sequence to time."""

    checked: Feed
    timed: Feed
    reference: NDArray[np.float32]
    centred: bool
    """Whether to take the mean off each row: what is added to all logits alike changes no probability."""
    is_text: bool

    def difference(self, output: NDArray[np.float32]) -> float:
        """Largest absolute difference, over the largest absolute value of the reference."""
        reference, output = self._rows(self.reference), self._rows(output)
        return float(np.abs(output - reference).max() / np.abs(reference).max())

    def cosine(self, output: NDArray[np.float32]) -> float:
        """Mean cosine of output and reference, token by token."""
        reference, output = self._rows(self.reference), self._rows(output)
        if self.centred:
            reference = reference - reference.mean(axis=1, keepdims=True)
            output = output - output.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(output, axis=1)
        return float(((reference * output).sum(axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)).mean())

    def _rows(self, output: NDArray[np.float32]) -> NDArray[np.float32]:
        """(sequences, tokens, columns) -> rows of tokens that are no padding; a classifier's logits in one row."""
        if output.ndim == 2:
            return output.reshape(1, -1)
        rows: NDArray[np.float32] = output[self.checked["attention_mask"].astype(bool)]
        return rows


def make_probe(model: Any, names: list[str], context: StepContext) -> Probe:
    """Tokens of the built-in text (random ones for a model without a tokenizer), the last sequence half padding."""
    is_text = any((context.source / name).is_file() for name in _TOKENIZER_FILES)
    checked = _tokens(context, _CHECKED_WINDOWS, _CHECKED_TOKENS, is_text=is_text)
    mask = np.ones_like(checked)
    mask[-1, checked.shape[1] // 2 :] = 0
    feed = _feed(checked, mask, names)
    timed = _tokens(context, 1, _TIMED_TOKENS, is_text=is_text)[:1]
    reference = run_torch(model, feed)
    return Probe(
        checked=feed,
        timed=_feed(timed, np.ones_like(timed), names),
        reference=reference,
        centred=reference.ndim == 3 and context.facts.family == "causal_lm",
        is_text=is_text,
    )


def run_torch(model: Any, feed: Feed) -> NDArray[np.float32]:
    """Outputs of the PyTorch model, as its graph gives them."""
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
        extra = {"use_cache": False} if model.config.to_dict().get("use_cache") is not None else {}
        output: NDArray[np.float32] = model(**tensors, return_dict=True, **extra)[0].numpy()
    return output


def contest(
    runners: Mapping[str, Callable[[], object]], tick: Callable[[float], None]
) -> dict[str, tuple[float, ...]]:
    """Run each in turns, round after round; return milliseconds by name. `tick` gets the share that is done."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    started = time.perf_counter()
    for number in range(_WARM_UP_ROUNDS + _MOST_ROUNDS):
        elapsed = time.perf_counter() - started
        if number >= _WARM_UP_ROUNDS + _FEWEST_ROUNDS and elapsed > _CONTEST_SECONDS:
            break
        tick(min(1.0, max(elapsed / _CONTEST_SECONDS, number / (_WARM_UP_ROUNDS + _MOST_ROUNDS))))
        for name, run in runners.items():
            time.sleep(_PAUSE_SECONDS)
            before = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - before) * 1e3)
    return {name: tuple(samples[_WARM_UP_ROUNDS:]) for name, samples in times.items()}


def speed_ratio(times: tuple[float, ...], best: tuple[float, ...]) -> float:
    """Median over the rounds of one's time over the other's: what slows a whole round down cancels out."""
    return median(a / b for a, b in zip(times, best, strict=True))


def _tokens(context: StepContext, windows: int, length: int, *, is_text: bool) -> NDArray[np.int64]:
    if is_text:
        tokenizer, text = load_tokenizer(context.source), builtin_text("calibration")
        ids = model_windows(tokenizer, text, context.facts, tokens=windows * length, length=length)
        return np.ascontiguousarray(ids[:windows].numpy())
    generator = np.random.default_rng(context.seed)
    shape = (windows, min(length, longest_window(context.facts)))
    return generator.integers(0, context.facts.vocab_size, shape, dtype=np.int64)


def _feed(tokens: NDArray[np.int64], mask: NDArray[np.int64], names: list[str]) -> Feed:
    known = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
    return {name: known[name] for name in names}
