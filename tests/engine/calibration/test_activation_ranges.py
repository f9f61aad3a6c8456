from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from workers.engine.calibration.activation_ranges import (
    BINS,
    Extremes,
    input_extremes,
    input_histograms,
    least_error_range,
)

_GENERATOR = torch.Generator().manual_seed(0)


def _rounded(values: torch.Tensor, low: float, high: float, levels: int) -> torch.Tensor:
    step = (high - low) / levels
    return torch.round((values.clamp(low, high) - low) / step) * step + low


def test_range_is_within_a_percent_of_the_best_that_brute_force_finds() -> None:
    values = torch.randn(20_000, generator=_GENERATOR)
    values[:4] = torch.tensor([9.0, -7.0, 8.0, 10.0])
    low, high, levels = float(values.min()), float(values.max()), 15
    counts = torch.histc(values, BINS, low, high)
    found = least_error_range(counts, low, high, levels=levels)

    def error(ends: tuple[float, float]) -> float:
        return float((_rounded(values, *ends, levels) - values).square().mean())

    shares = [k / 30 for k in range(4, 31)]
    best = min(error((low * a, high * b)) for a, b in itertools.product(shares, shares))
    assert error(found) < 1.01 * best
    assert error(found) < 0.7 * error((low, high))


def test_range_of_evenly_spread_values_is_kept_whole() -> None:
    assert least_error_range(torch.ones(BINS), -1.0, 3.0, levels=255) == (-1.0, 3.0)


def test_values_of_one_sign_keep_zero_as_an_end() -> None:
    low, high = least_error_range(torch.ones(BINS), 0.0, 2.0, levels=255)
    assert (low, high) == (0.0, 2.0)


def test_extremes_and_histograms_are_those_of_all_inputs_seen() -> None:
    block = nn.Sequential(nn.Linear(3, 2, bias=False))
    inputs = [torch.randn(2, 5, 3, generator=_GENERATOR) for _ in range(4)]
    rows = torch.cat([x.reshape(-1, 3) for x in inputs])

    def run() -> None:
        for x in inputs:
            block(x)

    with input_extremes(block, ["0"]) as seen:
        run()
    assert torch.equal(seen["0"].low, rows.amin(0))
    assert torch.equal(seen["0"].high, rows.amax(0))
    scale = torch.tensor([1.0, 2.0, 0.5])
    ends = seen["0"].divided(scale).ends()
    counts = input_histograms(block, {"0": scale}, {"0": ends}, run)["0"]
    assert counts.sum() == rows.numel()
    assert ends == pytest.approx((float((rows / scale).min()), float((rows / scale).max())))
    assert not block[0]._forward_pre_hooks


def test_ends_always_hold_zero() -> None:
    assert Extremes(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).ends() == (0.0, 4.0)
