from __future__ import annotations

import itertools

import pytest

from workers.engine.prune.allotment import allot, interpolated

CURVES = {
    "robust": ((0.3, 0.001), (0.5, 0.002), (0.7, 0.01)),
    "middling": ((0.3, 0.01), (0.5, 0.03), (0.7, 0.1)),
    "sensitive": ((0.3, 0.1), (0.5, 0.5), (0.7, 4.0)),
}
WEIGHTS = {"robust": 100, "middling": 300, "sensitive": 200}


def mean(found: dict[str, float]) -> float:
    return sum(found[name] * WEIGHTS[name] for name in found) / sum(WEIGHTS.values())


def cost(found: dict[str, float]) -> float:
    return sum(interpolated(CURVES[name], sparsity) for name, sparsity in found.items())


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.77, 0.9])
def test_all_together_are_as_sparse_as_asked_for_and_none_is_too_far_off(sparsity: float) -> None:
    found = allot(CURVES, WEIGHTS, sparsity, most_apart=0.2)
    assert mean(found) == pytest.approx(sparsity, abs=1e-9)
    assert all(sparsity - 0.2 <= s <= min(0.99, sparsity + 0.2) + 1e-9 for s in found.values())
    assert all(s >= 0 for s in found.values())
    assert found["robust"] >= found["middling"] >= found["sensitive"]


def test_no_other_sharing_costs_less() -> None:
    found = allot(CURVES, WEIGHTS, 0.5, most_apart=0.2)
    grid = [0.3 + 0.01 * step for step in range(41)]
    others = [
        dict(zip(CURVES, shares, strict=True))
        for shares in itertools.product(grid, repeat=3)
        if abs(mean(dict(zip(CURVES, shares, strict=True))) - 0.5) < 1e-9
    ]
    assert len(others) > 100
    assert cost(found) <= 1.001 * min(cost(other) for other in others)
    assert cost(found) < 0.5 * cost(dict.fromkeys(CURVES, 0.5))


def test_layers_alike_get_alike() -> None:
    curves = dict.fromkeys("abcd", CURVES["middling"])
    found = allot(curves, dict.fromkeys("abcd", 1000), 0.5, most_apart=0.2)
    assert all(s == pytest.approx(0.5, abs=0.02) for s in found.values())


def test_a_layer_that_costs_nothing_is_cut_first_and_a_curve_that_falls_does_no_harm() -> None:
    curves = CURVES | {
        "robust": ((0.3, 0.0), (0.5, 0.0), (0.7, 0.0)),
        "middling": ((0.3, 0.02), (0.5, 0.01), (0.7, 0.1)),
    }
    found = allot(curves, WEIGHTS, 0.5, most_apart=0.2)
    assert found["robust"] == pytest.approx(0.7)
    assert mean(found) == pytest.approx(0.5)


def test_between_points_the_logarithm_is_linear() -> None:
    curve = ((0.2, 0.01), (0.4, 0.04), (0.8, 0.64))
    assert interpolated(curve, 0.3) == pytest.approx(0.02)
    assert interpolated(curve, 0.6) == pytest.approx(0.16)
    assert interpolated(curve, 0.9) == pytest.approx(1.28)
    assert interpolated(curve, 0.1) == pytest.approx(0.005)
    assert interpolated(curve, 0.0) == 0
