from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from peers.texts import calibration_windows, evaluation_windows, spread_text
from quality_int8 import facts_of


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"This is document number {number:04d}." for number in range(2000)))
    return path


def test_calibration_is_spread_over_a_whole_text(llama: Path, text: Path, tmp_path: Path) -> None:
    spread_text(llama, text, tmp_path / "spread.txt", tokens=8000)
    numbers = [int(line[-5:-1]) for line in (tmp_path / "spread.txt").read_text().split("\n\n")]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert numbers[-1] > 1960
    assert 8000 <= 30 * len(numbers) <= 12_000


def test_peers_get_the_windows_that_the_engine_cuts(llama: Path, text: Path, tmp_path: Path) -> None:
    ours = calibration_windows(llama, facts_of(llama), text, tmp_path / "windows.npz", tokens=2048)
    windows = np.load(tmp_path / "windows.npz")["windows"]
    assert np.array_equal(ours, windows)
    assert windows.shape == (4, 512)
    assert windows.dtype == np.int64


def test_evaluation_windows_reach_from_the_start_to_the_end(llama: Path, text: Path) -> None:
    size = len(text.read_text())
    first, *_, last = evaluation_windows(llama, facts_of(llama), text, tokens=4096)
    everything = evaluation_windows(llama, facts_of(llama), text, tokens=size)
    assert np.array_equal(first, everything[0])
    assert np.array_equal(last, everything[-1])
