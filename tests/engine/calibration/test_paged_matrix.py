from __future__ import annotations

import mmap
from pathlib import Path

import torch

from app.spec.calibration_memory import PAGED_FEATURES
from workers.engine.calibration.paged_matrix import PagedMatrix, is_paged


def resident_file_bytes() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_released_rows_take_no_memory_and_come_back_as_they_were(tmp_path: Path) -> None:
    matrix = PagedMatrix(2048, tmp_path)
    assert list(tmp_path.iterdir()) == []
    values = torch.arange(2048 * 2048, dtype=torch.float32).view(2048, 2048)
    matrix.tensor.copy_(values)
    before = resident_file_bytes()
    matrix.release(slice(0, 2048))
    assert before - resident_file_bytes() > 0.9 * values.nbytes
    assert torch.equal(matrix.tensor, values)


def test_rows_beside_the_released_are_untouched(tmp_path: Path) -> None:
    matrix = PagedMatrix(100, tmp_path)
    matrix.tensor.fill_(1.0)
    matrix.release(slice(30, 70))
    assert bool((matrix.tensor == 1).all())
    assert mmap.PAGESIZE < 100 * 4 * 40


def test_only_large_matrices_on_a_cpu_are_paged() -> None:
    assert is_paged(PAGED_FEATURES, torch.device("cpu"))
    assert not is_paged(PAGED_FEATURES - 1, torch.device("cpu"))
    assert not is_paged(PAGED_FEATURES, torch.device("cuda"))
