"""Intervals by bootstrap: those of resampling everything, in memory that does not grow with the number of resamples."""

from __future__ import annotations

import tracemalloc
from itertools import product

import numpy as np
import pytest

from workers.engine.measure.bootstrap import DRAWS, resamples
from workers.engine.measure.classes import ClassQuality
from workers.engine.measure.language import Predictions


def change(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """The change of accuracy as it is reported; answers are right (class 0) or wrong."""
    quality = ClassQuality((0,) * len(before), seed=0)
    logits = [np.stack((right, ~right), 1).astype(np.float32) for right in (before, after)]
    quality.add(np.empty(0), logits[0], logits[1], finite=True)
    found: tuple[float, float, float] = quality.relative()["accuracy_change"]
    return found


def test_the_interval_of_accuracy_is_that_of_all_resamples() -> None:
    before = np.array([True, True, True, False, True, False])
    after = np.array([False, True, False, False, True, True])
    differences = after.astype(float) - before
    every = np.array([differences[list(drawn)].mean() for drawn in product(range(6), repeat=6)])
    low, high = np.quantile(every, (0.025, 0.975))
    assert change(before, after) == pytest.approx((differences.mean(), low, high))


def test_resamples_come_some_at_a_time_and_are_those_drawn_at_once() -> None:
    blocks = list(resamples(3001, seed=7))
    assert len(blocks) > 1
    expected = np.random.default_rng(7).integers(0, 3001, size=(DRAWS, 3001))
    assert np.array_equal(np.concatenate(blocks), expected)


def test_memory_is_that_of_the_answers_and_not_of_their_resamples() -> None:
    rng, count = np.random.default_rng(0), 20_000
    right = rng.random((2, count)) < 0.7
    windows = Predictions(
        original_nll=[100.0] * count, result_nll=rng.normal(101, 5, count).tolist(), scored=[50] * count
    )
    tracemalloc.start()
    change(right[0], right[1])
    mean, low, high = windows.delta_ln_perplexity(seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All places of all resamples at once are 320 MB.
    assert peak < 20e6
    assert high - low == pytest.approx(2 * 1.96 * 5 / 50 / count**0.5, rel=0.1)
    assert low < mean < high
