"""The scale search against the formula in float64 and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.grid import Fit, Grid, fit_groups

GRIDS = [Grid(bits, symmetric) for bits in (8, 4, 3, 2) for symmetric in (True, False)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(groups: int = 64, size: int = 32) -> Tensor:
    return torch.randn(groups, size, generator=torch.Generator().manual_seed(0)) * 0.05


def rebuilt(fit: Fit) -> Tensor:
    return fit.scale.double() * (fit.codes.double() - fit.zero.double())


def error_of(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Squared error per group of the nearest codes, in float64."""
    codes = (w.double() / scale + zero).round().clamp(-grid.half, grid.half - 1)
    return (scale * (codes - zero) - w.double()).square().sum(1, keepdim=True)


def least_error(w: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    """Brute force over 2000 scales of either sign and every zero point: (groups, 1)."""
    reach = w.abs().amax(1, keepdim=True).double()
    zeros = [0] if grid.symmetric else range(-grid.half, grid.half)
    best = torch.full_like(reach, torch.inf)
    for t in torch.linspace(0.2, 2.2, 1000, dtype=torch.float64):
        for sign in (1, -1) if grid.symmetric else (1,):
            scale = (sign * t * reach / grid.half).to(stored).double()
            for zero in zeros:
                best = torch.minimum(best, error_of(w, scale, torch.tensor(float(zero)), grid))
    return best


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("search", [True, False])
def test_codes_are_the_nearest_to_the_scale_as_stored(grid: Grid, stored: torch.dtype, search: bool) -> None:
    w = weights()
    fit = fit_groups(w, grid, stored, search=search)
    assert torch.equal(fit.scale, fit.scale.to(stored).float())
    assert fit.codes.amin() >= -grid.half
    assert fit.codes.amax() < grid.half
    assert torch.equal(fit.codes, fit.codes.round())
    actual = (rebuilt(fit) - w.double()).square().sum(1, keepdim=True)
    nearest = error_of(w, fit.scale.double(), fit.zero.double(), grid)
    torch.testing.assert_close(actual, nearest, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(fit.squared_error.double(), actual, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits < 8], ids=str)
def test_search_comes_close_to_brute_force(grid: Grid) -> None:
    w = weights(groups=24)
    searched = fit_groups(w, grid, torch.bfloat16, search=True).squared_error.sum().sqrt()
    least = least_error(w, grid, torch.bfloat16).sum().sqrt()
    assert searched <= 1.02 * least


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_is_never_worse_than_absmax(grid: Grid) -> None:
    w = weights()
    searched, absmax = (fit_groups(w, grid, torch.bfloat16, search=s).squared_error for s in (True, False))
    assert (searched <= absmax).all()
    assert searched.sum() < absmax.sum()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_symmetric_absmax_maps_the_signed_maximum_to_the_far_end(bits: int) -> None:
    grid = Grid(bits, symmetric=True)
    w = weights()
    fit = fit_groups(w, grid, torch.float32, search=False)
    far = w.gather(1, w.abs().argmax(1, keepdim=True))
    torch.testing.assert_close(fit.scale, far / -grid.half)
    assert (fit.codes.gather(1, w.abs().argmax(1, keepdim=True)) == -grid.half).all()
    assert (fit.zero == 0).all()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_asymmetric_absmax_covers_both_ends(bits: int) -> None:
    grid = Grid(bits, symmetric=False)
    w = weights() + 0.05
    fit = fit_groups(w, grid, torch.float32, search=False)
    # The rounded zero point moves the grid by half a step at most, and rounding costs another half.
    assert ((rebuilt(fit) - w).abs() <= 1.0001 * fit.scale).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_come_back_exactly(grid: Grid) -> None:
    codes = torch.arange(-grid.half, grid.half).float().repeat(4, 1)
    zero = 0 if grid.symmetric else -grid.half // 2
    w = 0.25 * (codes - zero)
    fit = fit_groups(w, grid, torch.bfloat16, search=True)
    assert torch.equal(rebuilt(fit), w.double())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tiny", [0.0, 1e-42, -1e-40])
def test_a_group_of_zeros_or_nearly_stays_finite(grid: Grid, tiny: float) -> None:
    w = torch.full((3, 16), tiny)
    w[1] = 0.5
    fit = fit_groups(w, grid, torch.bfloat16, search=True)
    assert torch.isfinite(rebuilt(fit)).all()
    assert (fit.scale != 0).all()
    torch.testing.assert_close(rebuilt(fit).float(), w, rtol=0.01, atol=1e-30)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_groups_of_one_sign_are_fitted(grid: Grid, shift: float) -> None:
    w = weights() * 0.1 + shift
    fit = fit_groups(w, grid, torch.bfloat16, search=True)
    assert ((rebuilt(fit) - w).norm() / w.norm()) < 0.2


def test_a_negative_peak_uses_the_longer_half_of_the_grid() -> None:
    w = torch.tensor([[-1.0, 0.875, 0.5, 0.0]])
    fit = fit_groups(w, Grid(4, symmetric=True), torch.bfloat16, search=False)
    assert torch.equal(rebuilt(fit), w.double())
