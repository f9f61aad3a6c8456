from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from workers.engine.measure.embeddings import (
    cosines,
    pairwise_similarities,
    pool,
    pooling_of,
    rank_correlation,
)

TOKENS = np.array([[1.0, 5.0], [3.0, 1.0], [2.0, 0.0]], dtype=np.float32)


def test_pooling_is_read_from_the_models_configuration(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == ("mean_tokens",)
    (tmp_path / "1_Pooling").mkdir()
    modes = {
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": True,
    }
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert pooling_of(tmp_path) == ("cls_token", "max_tokens")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cls_token", [1, 5]),
        ("lasttoken", [2, 0]),
        ("max_tokens", [3, 5]),
        ("mean_tokens", [2, 2]),
        ("mean_sqrt_len_tokens", [6 / 3**0.5, 6 / 3**0.5]),
    ],
)
def test_pooling_follows_its_definition(mode: str, expected: list[float]) -> None:
    assert pool(TOKENS, (mode,)) == pytest.approx(expected)


def test_cosine_of_turned_and_of_empty_vectors() -> None:
    a = np.array([[1, 0], [1, 0], [0, 0]], dtype=np.float32)
    b = np.array([[5, 0], [0, 2], [1, 1]], dtype=np.float32)
    assert cosines(a, b) == pytest.approx([1, 0, 0])


def test_similarities_are_those_of_each_pair_once() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
    assert pairwise_similarities(vectors) == pytest.approx([0, 0.5**0.5, 0.5**0.5])


def test_rank_correlation_looks_at_order_alone() -> None:
    values = np.array([0.1, 0.5, 0.2, 0.9])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    # Spearman's formula without ties, 1 - 6 Σd² / (n (n² - 1)): one neighbouring swap, Σd² = 2.
    assert rank_correlation(values, np.array([0.1, 0.9, 0.2, 0.5])) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_equal_values_share_a_rank_and_constant_ones_have_no_correlation() -> None:
    assert rank_correlation(np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 9.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2.0]), np.array([4.0, 4.0])) is None
