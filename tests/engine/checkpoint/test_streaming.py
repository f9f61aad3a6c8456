"""Slabs cover a tensor, come back in order, and stop at the first error."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.engine.checkpoint import Checkpoint, Slab, map_slabs, row_slabs


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        "big": torch.arange(1000.0).view(100, 10),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(7.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


def slabs_of(checkpoint: Checkpoint, slab_bytes: int) -> list[Slab]:
    return [slab for entry in checkpoint.tensors.values() for slab in row_slabs(entry, slab_bytes)]


def ignore(share: float) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize("slab_bytes", [1, 40, 400, 1300, 10**6])
@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_slabs_cover_each_row_once_and_begin_at_a_multiple(
    slab_bytes: int, multiple: int, checkpoint: Checkpoint
) -> None:
    slabs = list(row_slabs(checkpoint.tensors["big"], slab_bytes, multiple=multiple))
    assert [row for slab in slabs for row in range(slab.start, slab.stop)] == list(range(100))
    assert all(slab.start % multiple == 0 for slab in slabs)
    assert all(slab.nbytes <= max(slab_bytes, 40 * multiple) for slab in slabs)


def test_results_come_in_the_order_of_the_slabs(checkpoint: Checkpoint) -> None:
    def slow_at_first(slab: Slab, rows: torch.Tensor) -> float:
        time.sleep(0.02 if slab.start == 0 else 0)
        return float(rows.sum())

    slabs = slabs_of(checkpoint, 120)
    results = list(map_slabs(checkpoint, slabs, slow_at_first, threads=3, progress=ignore))
    assert [slab for slab, _ in results] == slabs
    big = [total for slab, total in results if slab.entry.name == "big"]
    assert big == [float(checkpoint.read_rows("big", s, min(100, s + 3)).sum()) for s in range(0, 100, 3)]
    assert [total for slab, total in results if slab.entry.name == "one"] == [7.0]


def test_progress_is_the_share_of_bytes(checkpoint: Checkpoint) -> None:
    seen: list[float] = []
    slabs = slabs_of(checkpoint, 1000)
    list(map_slabs(checkpoint, slabs, lambda slab, rows: None, threads=1, progress=seen.append))
    sizes = torch.tensor([slab.nbytes for slab in slabs]).cumsum(0) / 4004
    assert seen == pytest.approx(sizes.tolist())


def test_an_error_in_the_work_ends_it_and_restores_torch(checkpoint: Checkpoint) -> None:
    before, seen = torch.get_num_threads(), []

    def fail(slab: Slab, rows: torch.Tensor) -> None:
        seen.append(slab.start)
        time.sleep(0.01)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(map_slabs(checkpoint, slabs_of(checkpoint, 40), fail, threads=1, progress=ignore))
    assert len(seen) < 20
    assert torch.get_num_threads() == before
