"""GPTQ's mathematics against the paper's own procedure in float64, and against what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.compensation import (
    NotPositiveDefinite,
    compensated,
    damped,
    factored_in_place,
    factorize,
    output_error,
    row_errors,
)
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit, fit_layer

ROWS, COLUMNS, GROUP = 6, 160, 16


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def second_moment() -> Tensor:
    """Of inputs that are correlated, of very different sizes, and one of them always zero."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(400, COLUMNS, generator=generator) @ torch.randn(
        COLUMNS, COLUMNS, generator=generator
    )
    inputs *= torch.linspace(0.1, 3, COLUMNS)
    inputs[:, 7] = 0
    return inputs.t() @ inputs / len(inputs)


def fit_of(weight: Tensor, bits: int = 3, *, symmetric: bool = False) -> LayerFit:
    return fit_layer(weight, Grid(bits, symmetric), group_size=GROUP, dtype=torch.float32)


def by_the_paper(weight: Tensor, second_moment: Tensor, fit: LayerFit, damping: float) -> Tensor:
    """Optimal brain quantization column by column in a fixed order, with an explicit inverse that shrinks (eq. 2, 3)."""
    left, moments = weight.double().clone(), second_moment.double()
    moments.diagonal()[moments.diagonal() == 0] = 1
    order = torch.argsort(second_moment.diagonal(), descending=True, stable=True)
    damped = moments + damping * moments.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    codes = torch.empty_like(left)
    for done, j in enumerate(order.tolist()):
        free = order[done:]
        inverse = torch.linalg.inv(damped[free][:, free])
        scale, zero = (t[:, fit.group_of[j]].double() for t in (fit.scale, fit.zero))
        codes[:, j] = fit.grid.nearest_(left[:, j] / scale + zero)
        error = (left[:, j] - (codes[:, j] - zero) * scale) / inverse[0, 0]
        left[:, free] -= error[:, None] * inverse[0][None]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_the_paper_in_float64(
    weight: Tensor, second_moment: Tensor, symmetric: bool
) -> None:
    fit = fit_of(weight, symmetric=symmetric)
    weight[:, 7] = 0
    ours = compensated(weight, factorize(second_moment, 0.01), fit).codes
    expected = by_the_paper(weight, second_moment.clone(), fit, 0.01)
    # Sums in float32 may tip a weight that lies between two codes, and with it those it is made up for by.
    assert (ours.double() == expected).double().mean() > 0.99


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_outputs_lose_less_than_by_rounding_to_nearest(
    weight: Tensor, second_moment: Tensor, bits: int
) -> None:
    nearest = fit_of(weight, bits)
    ours = compensated(weight, factorize(second_moment, 0.01), nearest)
    assert ours.codes.min() >= -(1 << bits - 1)
    assert ours.codes.max() <= (1 << bits - 1) - 1
    lost, before = (output_error(fit.restored() - weight, second_moment) for fit in (ours, nearest))
    assert lost < 0.6 * before


def test_threads_share_the_rows_and_change_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(4100, 32, generator=generator)
    inputs = torch.randn(64, 32, generator=generator)
    fit = fit_layer(weight, Grid(4, symmetric=True), group_size=None, dtype=torch.float32)
    factor = factorize(inputs.t() @ inputs, 0.01)
    two, one = (compensated(weight, factor, fit, threads=threads).codes for threads in (2, 1))
    assert torch.equal(two, one)


def test_independent_inputs_of_one_size_leave_nothing_to_compensate(weight: Tensor) -> None:
    fit = fit_of(weight)
    assert torch.equal(compensated(weight, factorize(torch.eye(COLUMNS), 0.01), fit).codes, fit.codes)


def test_h_is_damped_as_it_was_factored_and_only_meanwhile(second_moment: Tensor) -> None:
    before = second_moment.clone()
    factor = factorize(second_moment, 0.05)
    inner = torch.linalg.inv(factor.flipped.tril().double().flip(0, 1))
    with damped(second_moment, 0.05):
        inside = second_moment.clone()
    assert torch.equal(second_moment, before)
    ordered = inside[factor.order][:, factor.order].double()
    torch.testing.assert_close(inner @ inner.t(), ordered, atol=1e-3, rtol=1e-3)
    assert inside[7, 7] > 1
    assert torch.equal(inside - inside.diagonal().diag(), before - before.diagonal().diag())


def test_factor_times_itself_is_the_inverse(second_moment: Tensor) -> None:
    second_moment.diagonal().add_(1.0)
    factor = factorize(second_moment.clone(), 0.01)
    upper = factor.flipped.tril().flip(0, 1).double()
    damped = second_moment.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    expected = torch.linalg.inv(damped[factor.order][:, factor.order])
    torch.testing.assert_close(upper.t() @ upper, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("columns", [COLUMNS, 1300])
def test_factor_in_the_memory_of_h_is_the_same_and_leaves_h_as_it_was(columns: int) -> None:
    inputs = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(5))
    inputs[:, 3] = 0
    moment = inputs.t() @ inputs
    moment = (moment + moment.t()) / 2
    before, expected = moment.clone(), factorize(moment, 0.05)
    with factored_in_place(moment, 0.05, "", []) as factor:
        assert factor is not None
        assert factor.flipped.data_ptr() == moment.data_ptr()
        assert torch.equal(factor.order, expected.order)
        assert torch.equal(factor.flipped.tril(), expected.flipped.tril())
    assert torch.equal(moment, before)


def test_h_is_put_back_where_it_has_no_factor() -> None:
    moment = torch.eye(4)
    moment[0, 1] = moment[1, 0] = 1e6
    before, warnings = moment.clone(), []
    with factored_in_place(moment, 0.01, "the layer", warnings) as factor:
        assert factor is None
    assert torch.equal(moment, before)
    assert warnings == ["not compensated, since the inputs' statistics have no factor: the layer"]


def test_coupling_is_the_factor_over_its_diagonal(second_moment: Tensor) -> None:
    factor = factorize(second_moment, 0.01)
    upper = factor.flipped.flip(0, 1)
    expected = (upper / upper.diagonal().unsqueeze(1))[10:30, 40:70].t()
    torch.testing.assert_close(factor.coupling(slice(40, 70), slice(10, 30)), expected)


def test_damping_grows_tenfold_until_there_is_a_factor() -> None:
    moments = torch.eye(4)
    moments[0, 1] = moments[1, 0] = 1.05
    assert factorize(moments, 0.01).damping == pytest.approx(0.1)


def test_statistics_beyond_damping_are_told() -> None:
    moments = torch.eye(4)
    moments[0, 1] = moments[1, 0] = 1e6
    with pytest.raises(NotPositiveDefinite):
        factorize(moments, 0.01)


def test_output_error_is_the_mean_squared_error_of_the_outputs(weight: Tensor) -> None:
    inputs = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(3))
    expected = (inputs.double() @ weight.double().t()).square().sum(1).mean().item()
    assert output_error(weight, inputs.t() @ inputs / 50) == pytest.approx(expected, rel=1e-4)


def test_errors_of_rows_add_up_to_that_of_the_layer(weight: Tensor, second_moment: Tensor) -> None:
    assert row_errors(weight, second_moment).sum().item() == pytest.approx(
        output_error(weight, second_moment), rel=1e-6
    )
