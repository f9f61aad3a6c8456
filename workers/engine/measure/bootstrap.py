"""95 % intervals by bootstrap: what a figure would be had other texts been drawn from the same ones (Efron 1979)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
_PLACES_AT_ONCE = 2**18


def resamples(count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """DRAWS rows of `count` places drawn with replacement, some rows at a time, so that memory does not grow with their product."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _PLACES_AT_ONCE // count)
    for start in range(0, DRAWS, at_once):
        yield generator.integers(0, count, size=(min(at_once, DRAWS - start), count))


def interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of what resamples gave."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)
