from __future__ import annotations

import pytest
import torch

from workers.engine.quantize.block_fit import fit_layer
from workers.engine.quantize.grid import Grid, fit_groups
from workers.engine.quantize.qdq import nearest_codes, row_grid, smoothing_factors

_GENERATOR = torch.Generator().manual_seed(1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_shorter_last_group_is_fitted_as_if_it_were_alone(*, symmetric: bool) -> None:
    weight = torch.randn(6, 40, generator=_GENERATOR)
    grid = Grid(4, symmetric)
    fit = fit_layer(weight, grid, 32, threads=2)
    alone = fit_groups(weight[:, 32:].contiguous(), grid, torch.float32, search=True)
    assert fit.codes.shape == weight.shape
    # Refits sum over zeros too, in another order.
    torch.testing.assert_close(fit.scale[:, 1:], alone.scale, rtol=1e-5, atol=0)
    assert torch.equal(fit.zero[:, 1:], alone.zero)
    assert torch.equal(fit.codes[:, 32:], alone.codes)


def test_restored_weights_are_scale_times_code_less_zero() -> None:
    weight = torch.randn(3, 20, generator=_GENERATOR)
    fit = fit_layer(weight, Grid(4, symmetric=False), 16, threads=1)
    restored = fit.restored(fit.codes)
    for row in range(3):
        for column in range(20):
            group = column // 16
            expected = (fit.codes[row, column] - fit.zero[row, group]) * fit.scale[row, group]
            assert restored[row, column] == expected


def test_smoothing_is_the_formula_of_smoothquant() -> None:
    inputs, weights = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([[1.0, -2.0, 5.0], [-0.5, 0.25, 1.0]])
    factors = smoothing_factors(inputs, [weights[:1], weights[1:]], 0.5)
    assert factors.tolist() == pytest.approx([(4 / 1) ** 0.5, (9 / 2) ** 0.5, 1.0])
    assert smoothing_factors(inputs, [weights], 0.0).tolist() == [1.0, 1.0, 1.0]


def test_rows_of_qdq_weights_have_positive_scales_and_the_nearest_codes() -> None:
    weight = torch.randn(5, 30, generator=_GENERATOR)
    weight[2] = 0
    grid = row_grid(weight)
    codes = nearest_codes(weight, grid)
    assert (grid.scale > 0).all()
    assert ((codes * grid.scale - weight).abs() <= grid.scale / 2 * 1.0001).all()
    assert codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
