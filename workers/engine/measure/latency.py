"""Time original and result in turns, so that whatever else the machine does meets both alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.spec.report import EvaluationImages, Latency
from workers.engine.measure.bootstrap import interval, resamples
from workers.engine.measure.results import Kind
from workers.engine.measure.runner_client import RunnerClient

_WARM_UP = 2
_TOKENS = 128
_THROUGHPUT_BATCH = 8


@dataclass(frozen=True)
class TimedRun:
    """One kind of run, named as the report names it."""

    what: str
    measure: Callable[[RunnerClient], float]
    """Milliseconds of one run."""


def timed_runs(kind: Kind, tokens: list[int], *, caches: bool) -> tuple[TimedRun, ...]:
    """The runs to time for a kind of model on `tokens`; `caches` if both runtimes have a key-value cache.

    Without one on both sides, a language model is timed on plain passes that compute the logits of every position.
    """
    tokens = tokens[:_TOKENS]
    count = len(tokens)
    if kind == "causal_lm" and caches:
        return (
            TimedRun(f"prefill 1×{count} tokens", lambda r: r.forward_ms(tokens, batch=1, last_only=True)),
            TimedRun("decode 1 token", lambda r: r.decode_ms(tokens)),
        )
    plain = "prefill" if kind == "causal_lm" else "batch"
    batches = (1,) if kind == "causal_lm" else (1, _THROUGHPUT_BATCH)
    return tuple(
        TimedRun(
            f"{plain} {batch}×{count} tokens",
            lambda r, batch=batch: r.forward_ms(tokens, batch=batch, last_only=False),  # type: ignore[misc]
        )
        for batch in batches
    )


def timed_image_runs(images_file: Path, images: EvaluationImages) -> tuple[TimedRun, ...]:
    """One image, and several together."""
    size = f"{images.height}×{images.width}"
    return tuple(
        TimedRun(
            f"batch {batch} of {size} pixels",
            lambda r, batch=batch: r.images_ms(images_file, batch=batch),  # type: ignore[misc]
        )
        for batch in (1, _THROUGHPUT_BATCH)
    )


class LatencyInTurns:
    """Times of both models, gathered round by round."""

    def __init__(self, runs: tuple[TimedRun, ...], models: tuple[RunnerClient, RunnerClient]) -> None:
        """Time `models`, the original first, on each of `runs`."""
        self._runs = runs
        self._models = models
        self._samples: list[tuple[list[float], list[float]]] = [([], []) for _ in runs]

    def rounds(self, count: int) -> Iterator[int]:
        """Warm up, then time `count` rounds; yields after each, warm-up included. Who goes first alternates."""
        for number in range(-_WARM_UP, count):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for run, samples in zip(self._runs, self._samples, strict=True):
                for model in order:
                    took = run.measure(self._models[model])
                    if number >= 0:
                        samples[model].append(took)
            yield number + _WARM_UP + 1

    def result(self, model: int) -> tuple[Latency, ...]:
        """Times of one model: 0 the original, 1 the result."""
        pairs = zip(self._runs, self._samples, strict=True)
        return tuple(summarize(run.what, samples[model]) for run, samples in pairs)


def rounds_in_all(count: int) -> int:
    """How often `rounds(count)` yields."""
    return count + _WARM_UP


def ratio_interval(original: Latency, result: Latency, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the result's median over the original's, by bootstrap over rounds.

    Rounds are drawn in pairs: what slowed one model in a round most likely slowed the other.
    """
    before, after = np.asarray(original.samples_ms), np.asarray(result.samples_ms)
    return interval(
        np.concatenate(
            [
                np.median(after[drawn], axis=1) / np.median(before[drawn], axis=1)
                for drawn in resamples(len(before), seed)
            ]
        )
    )


def summarize(what: str, samples_ms: list[float]) -> Latency:
    """Median and 95th percentile of times in milliseconds."""
    return Latency(
        what=what,
        median_ms=float(np.median(samples_ms)),
        p95_ms=float(np.quantile(samples_ms, 0.95)),
        samples_ms=tuple(round(sample, 4) for sample in samples_ms),
    )
