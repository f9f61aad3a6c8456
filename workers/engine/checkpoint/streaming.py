"""Run a function over every row slab of a checkpoint on a few threads, with memory independent of the model's size.

Slabs are cut by size alone and their results come back in order, so sums over them do not depend on the threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from workers.engine.checkpoint.layout import TensorEntry
from workers.engine.checkpoint.reader import Checkpoint

SLAB_BYTES = 2 * 2**20
# A spare thread reads while the others compute.
_SPARE_THREADS = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Slab:
    """Rows `start` to `stop` of a tensor."""

    entry: TensorEntry
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return (self.stop - self.start) * self.entry.row_nbytes


def row_slabs(entry: TensorEntry, slab_bytes: int = SLAB_BYTES, *, multiple: int = 1) -> Iterator[Slab]:
    """Cut a tensor into slabs of about `slab_bytes` that begin at a multiple of `multiple` rows."""
    rows = slab_bytes // max(1, entry.row_nbytes)
    step = max(multiple, rows // multiple * multiple)
    for start in range(0, entry.rows, step):
        yield Slab(entry, start, min(entry.rows, start + step))


def map_slabs(
    checkpoint: Checkpoint,
    slabs: Iterable[Slab],
    work: Callable[[Slab, Tensor], T],
    *,
    threads: int,
    progress: Callable[[float], None],
) -> Iterator[tuple[Slab, T]]:
    """Yield (slab, work(slab, rows)) in the order of `slabs`; `rows` is only valid inside `work`.

    `progress` is called with the share of bytes done. The first exception of `work` or `progress` ends it all.
    """
    todo = list(slabs)
    total = max(1, sum(slab.nbytes for slab in todo))
    largest = max((slab.nbytes for slab in todo), default=0)
    local = threading.local()

    def run(slab: Slab) -> T:
        if not hasattr(local, "buffer"):
            local.buffer = torch.empty(largest, dtype=torch.uint8)
        rows = checkpoint.read_rows(slab.entry.name, slab.start, slab.stop, out=local.buffer)
        return work(slab, rows)

    with one_torch_thread(), ThreadPoolExecutor(threads + _SPARE_THREADS) as pool:
        try:
            done = 0
            for slab, result in zip(todo, pool.map(run, todo), strict=True):
                yield slab, result
                done += slab.nbytes
                progress(done / total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let each of our threads compute on its own core: two pools would fight over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
