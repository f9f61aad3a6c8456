"""How sparse each layer is to be, so that all together are as sparse as asked for and the loss grows least.

What a layer costs at a sparsity is known at a few; between them its logarithm is taken for linear. The layer whose next
weights cost least is made sparser, a little at a time, until enough is gone: the best there is where costs grow faster
the sparser a layer is, which they are made to do (marginal allocation; Fox 1966, "Discrete optimization via marginal
analysis").
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence

MOST_APART = 0.2
"""How far the sparsity of a layer may be from that of all."""
_STEP = 0.01
_TINY = 1e-30


def allot(
    costs: Mapping[str, Sequence[tuple[float, float]]],
    weights: Mapping[str, int],
    sparsity: float,
    *,
    most_apart: float = MOST_APART,
) -> dict[str, float]:
    """A sparsity for each layer; over all weights their mean is `sparsity`, and none is further than `most_apart` from it.

    costs: of each layer (sparsity, what the loss grows by) with sparsities ascending.
    """
    low, high = max(0.0, sparsity - most_apart), min(1.0 - _STEP, sparsity + most_apart)
    steps = math.ceil((high - low) / _STEP - 1e-9)
    grid = [low + (high - low) * step / steps for step in range(steps + 1)]
    marginal = {name: _marginal(curve, grid) for name, curve in costs.items()}
    level = dict.fromkeys(costs, 0)
    left = (sparsity - low) * sum(weights.values())
    queue = [(slopes[0] / weights[name], name) for name, slopes in marginal.items()]
    heapq.heapify(queue)
    found = dict.fromkeys(costs, low)
    while queue and left > 0:
        _, name = heapq.heappop(queue)
        width = grid[level[name] + 1] - grid[level[name]]
        share = min(1.0, left / (width * weights[name]))
        left -= share * width * weights[name]
        level[name] += 1
        found[name] += share * width
        if level[name] < steps:
            heapq.heappush(queue, (marginal[name][level[name]] / weights[name], name))
    return found


def _marginal(curve: Sequence[tuple[float, float]], grid: Sequence[float]) -> list[float]:
    """What each step along the grid costs; never less than the step before it."""
    values = [interpolated(curve, point) for point in grid]
    slopes: list[float] = []
    for before, after in itertools.pairwise(values):
        slopes.append(max(after - before, slopes[-1] if slopes else 0.0))
    return slopes


def interpolated(curve: Sequence[tuple[float, float]], sparsity: float) -> float:
    """The cost at a sparsity: exponential between the points and beyond the last ones, and none where nothing goes."""
    if sparsity <= 0:
        return 0.0
    points = [(x, math.log(max(y, _TINY))) for x, y in curve]
    place = next((i for i in range(1, len(points) - 1) if sparsity < points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return math.exp(y0 + (sparsity - x0) * (y1 - y0) / (x1 - x0))
