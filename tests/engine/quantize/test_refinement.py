"""Refining scales and codes: against brute force, and never for the worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.compensation import compensated, factorize, row_errors
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit, fit_layer
from workers.engine.quantize.refinement import descended, refined, refit_scales, scale_system

ROWS, COLUMNS, GROUP = 6, 96, 16


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def second_moment() -> Tensor:
    """Of correlated inputs, damped."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(300, COLUMNS, generator=generator) @ torch.randn(
        COLUMNS, COLUMNS, generator=generator
    )
    return mixed.t() @ mixed / 300 + torch.eye(COLUMNS)


@pytest.fixture
def order(second_moment: Tensor) -> Tensor:
    return torch.argsort(second_moment.diagonal(), descending=True, stable=True)


def solved(weight: Tensor, second_moment: Tensor, bits: int = 3, *, symmetric: bool = True) -> LayerFit:
    fit = fit_layer(weight, Grid(bits, symmetric), group_size=GROUP, dtype=torch.float32)
    return compensated(weight, factorize(second_moment, 0.01), fit)


def errors(weight: Tensor, fit: LayerFit, second_moment: Tensor) -> Tensor:
    return row_errors((fit.restored() - weight).double(), second_moment.double())


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scales_are_where_the_error_has_no_slope(
    weight: Tensor, second_moment: Tensor, symmetric: bool
) -> None:
    fit = solved(weight, second_moment, symmetric=symmetric)
    better = refit_scales(weight, fit, second_moment)
    scale = better.scale.double().requires_grad_()
    levels = better.levels().double().view(ROWS, -1, GROUP)
    left = (levels * scale.unsqueeze(2)).flatten(1) - weight
    (slope,) = torch.autograd.grad(torch.einsum("ri,ij,rj->", left, second_moment.double(), left), scale)
    before = (errors(weight, fit, second_moment) / scale.abs().amin(1)).max()
    assert slope.abs().max() < 1e-3 * before
    assert (errors(weight, better, second_moment) < errors(weight, fit, second_moment)).all()


def test_system_of_the_scales_is_that_of_the_formula(weight: Tensor, second_moment: Tensor) -> None:
    fit = solved(weight, second_moment)
    system, right = scale_system(weight, fit.levels(), second_moment, GROUP)
    for row in range(ROWS):
        spread = torch.zeros(COLUMNS, COLUMNS // GROUP, dtype=torch.float64)
        spread[torch.arange(COLUMNS), fit.group_of] = fit.levels()[row].double()
        moments = second_moment.double()
        torch.testing.assert_close(system[row].double(), spread.t() @ moments @ spread, rtol=1e-4, atol=1e-2)
        expected = spread.t() @ moments @ weight[row].double()
        torch.testing.assert_close(right[row].double(), expected, rtol=1e-4, atol=1e-2)


def test_descent_moves_each_code_to_its_best_given_the_others(
    weight: Tensor, second_moment: Tensor, order: Tensor
) -> None:
    fit = solved(weight, second_moment, bits=2)
    codes = descended(weight, fit, second_moment, order).codes
    expected = fit.codes.clone()
    for j in order.tolist():
        tried = []
        for code in range(-2, 2):
            expected[:, j] = code
            tried.append(errors(weight, replace(fit, codes=expected), second_moment))
        expected[:, j] = torch.stack(tried).argmin(0).float() - 2
    assert (codes == expected).double().mean() > 0.99


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_each_round_lowers_the_error(
    weight: Tensor, second_moment: Tensor, order: Tensor, bits: int, symmetric: bool
) -> None:
    fit = solved(weight, second_moment, bits, symmetric=symmetric)
    lost = [
        errors(weight, refined(weight, fit, second_moment, order, rounds=rounds), second_moment).sum().item()
        for rounds in (0, 1, 4)
    ]
    assert lost[2] <= lost[1] < lost[0]


def test_a_group_whose_codes_are_all_zero_keeps_its_scale(weight: Tensor, second_moment: Tensor) -> None:
    weight[2, :GROUP] = 0
    fit = solved(weight, second_moment)
    codes = fit.codes.clone()
    codes[2, :GROUP] = 0
    better = refit_scales(weight, replace(fit, codes=codes), second_moment)
    assert better.scale[2, 0] == fit.scale[2, 0]
    assert torch.isfinite(better.scale).all()


def test_scales_of_one_row_are_refitted_as_among_others(weight: Tensor, second_moment: Tensor) -> None:
    # What a layer's rows leave over when they are cut into parts may be a single row.
    fit = solved(weight, second_moment)
    together = refit_scales(weight, fit, second_moment).scale[:1]
    alone = refit_scales(weight[:1], fit.of_rows(slice(0, 1)), second_moment).scale
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=0)
