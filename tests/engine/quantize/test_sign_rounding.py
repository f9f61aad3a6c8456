"""The mathematics of trained rounding, against float64 autograd and brute force at toy size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit, fit_layer
from workers.engine.quantize.sign_rounding import (
    best_alone,
    codes_of,
    doubts,
    latent_signs,
    rates,
)

ROWS, COLUMNS, SIZE = 6, 16, 4


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[True, False], ids=["symmetric", "asymmetric"])
def fit(request: pytest.FixtureRequest, weight: Tensor) -> LayerFit:
    return fit_layer(weight, Grid(3, symmetric=request.param), group_size=SIZE, dtype=torch.float32)


@pytest.fixture
def second_moment() -> Tensor:
    inputs = torch.randn(40, COLUMNS, generator=torch.Generator().manual_seed(1))
    return inputs.t() @ inputs / 40


def test_signs_are_those_of_autograd_with_rounding_passed_straight_through(fit: LayerFit) -> None:
    latent = fit.codes.double().requires_grad_()
    levels = latent.view(ROWS, -1, SIZE) - fit.zero.double().unsqueeze(2)
    restored = (levels * fit.scale.double().unsqueeze(2)).flatten(1)
    inputs = torch.randn(COLUMNS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    restored.retain_grad()
    (restored @ inputs).square().sum().backward()
    assert torch.equal(latent_signs(fit, restored.grad.float()), latent.grad.sign().float())


def test_best_alone_minimises_the_output_error_over_one_weight(
    fit: LayerFit, weight: Tensor, second_moment: Tensor
) -> None:
    restored = fit.restored()
    wanted = best_alone(weight, restored, second_moment)

    def error(candidate: Tensor) -> float:
        difference = candidate - weight[2]
        return float(difference @ second_moment @ difference)

    for column in (0, 7, 15):
        tried = [restored[2].clone() for _ in range(3)]
        for row, offset in zip(tried, (-0.01, 0.0, 0.01), strict=True):
            row[column] = wanted[2, column] + offset
        assert error(tried[1]) < min(error(tried[0]), error(tried[2]))


def test_weight_of_an_input_that_is_always_zero_stays(
    fit: LayerFit, weight: Tensor, second_moment: Tensor
) -> None:
    second_moment[3], second_moment[:, 3] = 0, 0
    wanted = best_alone(weight, fit.restored(), second_moment)
    assert torch.equal(wanted[:, 3], fit.restored()[:, 3])
    assert torch.isfinite(wanted).all()


def test_training_starts_at_the_codes_there_are(fit: LayerFit, weight: Tensor) -> None:
    far = weight + 3 * fit.scale.abs().max()
    for wanted in (weight, far):
        assert torch.equal(codes_of(fit, fit.codes + doubts(fit, wanted)), fit.codes)


def test_rates_fall_linearly_and_add_up_to_half_a_step() -> None:
    found = torch.tensor(rates(200), dtype=torch.float64)
    assert found[0] == 1 / 200
    assert torch.allclose(found.diff(), found.diff()[0].expand(199))
    assert 0.5 <= found.sum() < 0.51
