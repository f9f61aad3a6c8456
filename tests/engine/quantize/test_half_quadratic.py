"""Half-quadratic fits: what they minimise, and that files and loaders see an ordinary grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.grid import Fit, Grid, fit_groups
from workers.engine.quantize.half_quadratic import fit_half_quadratic, shrunk

GRIDS = [Grid(4, symmetric=True), Grid(4, symmetric=False), Grid(2, symmetric=True), Grid(3, symmetric=False)]


@pytest.fixture
def groups() -> Tensor:
    """Weights with a few outliers: (64, 32)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 32, generator=generator)
    weights[::4, 5] *= 8
    return weights


def lost(fit: Fit, groups: Tensor) -> float:
    return float(((fit.codes - fit.zero) * fit.scale - groups).abs().pow(0.7).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sum_of_roots_of_errors_is_below_that_of_the_least_squares(grid: Grid, groups: Tensor) -> None:
    found = lost(fit_half_quadratic(groups, grid, torch.float32), groups)
    assert found < lost(fit_groups(groups, grid, torch.float32, search=True), groups)
    assert found < 0.97 * lost(fit_groups(groups, grid, torch.float32, search=False), groups)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_are_as_stored_and_codes_and_zero_points_are_on_the_grid(grid: Grid, groups: Tensor) -> None:
    fit = fit_half_quadratic(groups, grid, torch.bfloat16)
    assert torch.equal(fit.scale, fit.scale.bfloat16().float())
    for values in (fit.codes, fit.zero):
        assert torch.equal(values, values.round().clamp(-grid.half, grid.half - 1))
    restored = (fit.codes - fit.zero) * fit.scale
    torch.testing.assert_close(fit.squared_error, (restored - groups).square().sum(-1, keepdim=True))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_groups_of_zeros_stay_zeros(grid: Grid) -> None:
    fit = fit_half_quadratic(torch.zeros(2, 8), grid, torch.float32)
    assert torch.equal((fit.codes - fit.zero) * fit.scale, torch.zeros(2, 8))


def test_shrinking_takes_small_errors_whole_and_leaves_large_ones() -> None:
    errors = torch.tensor([0.0, 0.01, -0.1, 1.0, -4.0])
    left = shrunk(errors, beta=10.0)
    assert left[:3].tolist() == [0, 0, 0]
    assert left[3].item() == pytest.approx(1 - 0.1)
    assert left[4].item() == pytest.approx(-(4 - 4**-0.3 / 10))
