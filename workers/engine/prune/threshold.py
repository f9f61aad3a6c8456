"""The exact magnitude below which a given share of weights lies, found by streaming in constant memory.

The float32 bits of |w|, read as an integer, order like |w| itself. A histogram over their upper 16 bits, and one over
the lower 15 inside the bin where the threshold falls, give it in two passes. Weights equal to the threshold are cut in
the share that makes the sparsity exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.checkpoint import Checkpoint, Slab, TensorEntry, map_slabs, row_slabs
from workers.engine.checkpoint.selection import non_finite

_LOW_BITS = 15
_HIGH_BINS = 1 << 16
_INFINITE_BIN = 0x7F800000 >> _LOW_BITS
# What a pass over slabs works with: (N,) float32 weights.
_CHUNK_WEIGHTS = 2**18


@dataclass(frozen=True)
class Threshold:
    """Weights whose key is below `key` become zero, and of those equal to it the share `of_ties`."""

    key: int
    of_ties: float


def find_threshold(
    checkpoint: Checkpoint,
    layers: list[TensorEntry],
    sparsity: float,
    *,
    threads: int,
    progress: Callable[[float], None],
) -> Threshold:
    """Where to cut so that round(sparsity · weights) of the layers' weights fall below, ties shared out."""
    slabs = [slab for layer in layers for slab in row_slabs(layer)]
    wanted = round(sparsity * sum(math.prod(layer.shape) for layer in layers))

    def histogram(count: Callable[[Tensor], Tensor], begin: float) -> Tensor:
        def work(slab: Slab, rows: Tensor) -> Tensor:
            counts = _sum(count(magnitude_keys(part)) for part in chunks(rows))
            if len(counts) == _HIGH_BINS and counts[_INFINITE_BIN:].any():
                raise non_finite(slab.entry.name)
            return counts

        def halfway(share: float) -> None:
            progress(begin + share / 2)

        return _sum(
            counts for _, counts in map_slabs(checkpoint, slabs, work, threads=threads, progress=halfway)
        )

    high, below = _cut(histogram(count_high, 0.0), wanted)
    lows = histogram(lambda keys: count_low(keys, high), 0.5)
    low, below_low = _cut(lows, wanted - below)
    return Threshold(
        key=(high << _LOW_BITS) + low, of_ties=(wanted - below - below_low) / max(1, int(lows[low]))
    )


def count_high(keys: Tensor) -> Tensor:
    """Histogram of the keys' upper bits: (n,) -> (65536,)."""
    return torch.bincount(keys >> _LOW_BITS, minlength=_HIGH_BINS)


def count_low(keys: Tensor, high: int) -> Tensor:
    """Histogram of the lower bits of the keys whose upper bits are `high`: (n,) -> (32768,)."""
    lows = keys[keys >> _LOW_BITS == high] & ((1 << _LOW_BITS) - 1)
    return torch.bincount(lows, minlength=1 << _LOW_BITS)


def _cut(histogram: Tensor, wanted: int) -> tuple[int, int]:
    """The bin where the count passes `wanted`, and how many lie below that bin."""
    cumulative = histogram.cumsum(0)
    cut = min(int(torch.searchsorted(cumulative, wanted, right=False)), len(histogram) - 1)
    return cut, int(cumulative[cut] - histogram[cut])


def spread(count: int, share: float) -> Tensor:
    """Indices of round(share · count) of `count` things, as evenly spaced as can be."""
    chosen = round(share * count)
    return torch.arange(chosen) * count // max(1, chosen)


def magnitude_keys(weights: Tensor) -> Tensor:
    """The bits of |w| as float32: (n,) -> (n,), int32, ordered like |w|."""
    return weights.float().view(torch.int32) & 0x7FFFFFFF


def chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """Flat parts of rows that stay in a core's cache; each a multiple of four long but the last."""
    return torch.split(rows.view(-1), _CHUNK_WEIGHTS)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("there is nothing to add")
    return total
