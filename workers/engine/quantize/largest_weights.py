"""A pass over weights that only looks for the largest of each, for grids that depend on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from workers.engine.checkpoint import Checkpoint, Slab, map_slabs, row_slabs
from workers.engine.checkpoint.selection import non_finite
from workers.engine.checkpoint.streaming import SLAB_BYTES


def largest_weights(
    checkpoint: Checkpoint,
    names: Iterable[str],
    *,
    slab_bytes: int = SLAB_BYTES,
    threads: int,
    progress: Callable[[float], None],
) -> dict[str, float]:
    """The largest magnitude of each named weight. Raises InvalidRequest when one is not finite."""
    peaks = dict.fromkeys(names, 0.0)
    slabs = [slab for name in peaks for slab in row_slabs(checkpoint.tensors[name], slab_bytes)]
    for slab, peak in map_slabs(checkpoint, slabs, _peak, threads=threads, progress=progress):
        peaks[slab.entry.name] = max(peaks[slab.entry.name], peak)
    return peaks


def _peak(slab: Slab, rows: Tensor) -> float:
    peak = float(rows.abs().max())
    if not math.isfinite(peak):
        raise non_finite(slab.entry.name)
    return peak
