"""Floating-point grids against brute force over every number they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.compensation import compensated, factorize, output_error
from workers.engine.quantize.float_grids import Fp8Grid, Mxfp4Grid, Nvfp4Grid, global_scale
from workers.engine.quantize.grid import WeightGrid, fit_groups
from workers.engine.quantize.layer_fit import fit_blocks, fit_layer
from workers.engine.quantize.refinement import refined

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
PEAK = 0.23
GRIDS: list[WeightGrid] = [Fp8Grid(), Fp8Grid(PEAK / 448), Mxfp4Grid(), Nvfp4Grid(global_scale(PEAK))]
SIZES = {Fp8Grid: 512, Mxfp4Grid: 32, Nvfp4Grid: 16}


def weights(rows: int = 48, columns: int = 128) -> Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    return drawn.clamp_(-PEAK, PEAK)


def magnitudes(grid: WeightGrid) -> Tensor:
    return E4M3 if isinstance(grid, Fp8Grid) else E2M1


def nearest(exact: Tensor, levels: Tensor) -> Tensor:
    """The nearest of all numbers; of two as near the one with an even mantissa, which has an even index."""
    exact = exact.double()
    distance = (exact.abs().unsqueeze(-1) - levels).abs()
    odd = torch.arange(len(levels)) % 2
    best = (distance + odd * 1e-12).argmin(-1)
    return levels[best] * exact.sign()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_the_nearest_numbers_and_ties_go_to_the_even_one(grid: WeightGrid) -> None:
    levels = magnitudes(grid)
    halves = (levels[1:] + levels[:-1]) / 2
    drawn = (
        torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * levels[-1] / 2
    )
    exact = torch.cat((halves, -halves, levels, -levels, drawn, 3 * levels[-1:])).float()
    assert torch.equal(grid.nearest_(exact.clone()).double(), nearest(exact, levels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_are_what_can_be_stored(grid: WeightGrid, dtype: torch.dtype) -> None:
    drawn = torch.rand(200, generator=torch.Generator().manual_seed(2)) * 0.01
    wanted = torch.cat((drawn, -drawn, torch.zeros(1), torch.full((1,), 1e-42)))
    scale = grid.stored(wanted, dtype)
    assert torch.equal(grid.stored(scale, dtype), scale)
    assert (scale > 0).all()
    assert torch.isfinite(scale.reciprocal()).all()
    if isinstance(grid, Fp8Grid):
        assert torch.equal(scale.to(dtype).float(), scale)
    elif isinstance(grid, Mxfp4Grid):
        assert (torch.frexp(scale).mantissa == 0.5).all()
    elif isinstance(grid, Nvfp4Grid):
        assert torch.equal(grid.local_scale(scale).float() / grid.global_scale, scale)


def test_the_global_scale_makes_the_largest_scale_the_largest_there_is() -> None:
    grid = Nvfp4Grid(global_scale(PEAK))
    peak = grid.local_scale(torch.tensor([PEAK / 6])).float()
    assert peak.item() == 448
    assert global_scale(0.0) == 1.0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_is_never_worse_than_absmax_and_comes_close_to_brute_force(grid: WeightGrid) -> None:
    groups = weights().view(-1, SIZES[type(grid)])
    searched, absmax = (
        fit_groups(groups, grid, torch.bfloat16, search=s).squared_error for s in (True, False)
    )
    assert (searched <= absmax).all()
    start, _ = grid.start(groups)
    least = torch.full_like(searched, torch.inf)
    for factor in torch.linspace(0.4, 2.4, 201):
        scale = grid.stored(start * factor, torch.bfloat16)
        rebuilt = nearest(groups / scale, magnitudes(grid)) * scale
        least = torch.minimum(least, (rebuilt - groups).square().sum(1, keepdim=True).float())
    assert searched.sum().sqrt() <= 1.03 * least.sum().sqrt()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_group_of_zeros_stays_zeros(grid: WeightGrid) -> None:
    fit = fit_groups(torch.zeros(2, 16), grid, torch.bfloat16, search=True)
    assert (fit.codes * fit.scale == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compensation_and_refinement_lower_the_error_of_the_outputs(grid: WeightGrid) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    weight, moment = weights(), inputs.t() @ inputs / 512
    factor = factorize(moment, 0.01)
    size = None if isinstance(grid, Fp8Grid) else SIZES[type(grid)]
    fit = fit_layer(weight, grid, group_size=size, dtype=torch.bfloat16, importance=moment.diagonal())
    fits = [fit, compensated(weight, factor, fit)]
    fits.append(refined(weight, fits[-1], moment, factor.order, rounds=1))
    errors = [output_error(f.restored() - weight, moment) for f in fits]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]
    for f in fits:
        assert torch.equal(grid.stored(f.scale, torch.bfloat16), f.scale)
        assert torch.equal(nearest(f.codes, magnitudes(grid)).float(), f.codes)


def test_a_scale_for_the_whole_weight_stays_that_through_a_refit() -> None:
    grid = Fp8Grid(PEAK / 448)
    moment = torch.eye(128) + 0.5
    fit = fit_layer(weights(), grid, group_size=None, dtype=torch.bfloat16)
    fit = refined(weights(), fit, moment, torch.arange(128), rounds=1)
    assert fit.scale.unique().tolist() == [torch.tensor(PEAK / 448).bfloat16().float().item()]


@pytest.mark.parametrize("rows", [128, 200])
def test_blocks_are_fitted_each_by_itself_and_the_last_may_be_short(rows: int) -> None:
    weight = weights(rows, 256)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(4))
    fit = fit_blocks(weight, Fp8Grid(), size=128, dtype=torch.bfloat16, importance=importance)
    assert fit.restored().shape == weight.shape
    for top in range(0, rows, 128):
        for left in (0, 128):
            block = weight[top : top + 128, left : left + 128]
            alone = fit_groups(
                block.reshape(1, -1), Fp8Grid(), torch.bfloat16, search=True,
                importance=importance[left : left + 128].repeat(len(block)).view(1, -1),
            )  # fmt: skip
            scales = fit.scale[top : top + 128, left // 128]
            assert scales.unique().tolist() == alone.scale.flatten().tolist()
            expected = (alone.codes * alone.scale).view(block.shape)
            assert torch.equal(fit.restored()[top : top + 128, left : left + 128], expected)
