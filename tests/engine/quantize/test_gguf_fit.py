"""Scales of GGUF's blocks against the package's own encoders, and against exhaustive search in float64."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from workers.engine.quantize.gguf_fit import fit_blocks
from workers.engine.quantize.gguf_scales import GRIDS

IMPORTANCE = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 2 + 0.02


def weight(rows: int = 16) -> Tensor:
    """Heavy tails, and groups that are not centred on zero."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, 512, generator=generator)
    return 0.05 * (values * values.abs().sqrt() + 0.3 * torch.randn(rows, 1, generator=generator))


def error(values: Tensor, name: str, importance: Tensor, *, fitted_for: Tensor) -> float:
    scales = fit_blocks(values, fitted_for, GRIDS[name])
    difference = scales.weights(scales.codes(values)) - values
    return float((difference.double().square() * importance).sum())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_error_is_less_than_that_of_the_package(name: str) -> None:
    values, kind = weight(), gguf.GGMLQuantizationType[name]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), kind), kind))
    lost = float((theirs - values).double().square().sum())
    assert error(values, name, torch.ones(512), fitted_for=torch.ones(512)) < 0.95 * lost


@pytest.mark.parametrize("name", GRIDS)
def test_importance_lowers_the_error_it_weighs(name: str) -> None:
    weighed, plain = (
        error(weight(), name, IMPORTANCE, fitted_for=fitted_for)
        for fitted_for in (IMPORTANCE, torch.ones(512))
    )
    assert weighed < plain


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_one_scale_is_close_to_the_best_of_all_there_are(name: str) -> None:
    values, grid = weight(4), GRIDS[name]
    groups, h = values.double().view(-1, 32), IMPORTANCE.double().view(-1, 32).repeat(4, 1)
    middle = grid.levels // 2
    largest = groups.abs().amax(1, keepdim=True)
    least = torch.full((len(groups),), torch.inf, dtype=torch.float64)
    for share in torch.linspace(-1.6, 1.6, 3201).tolist():
        if share == 0:
            continue
        scale = (largest * share / middle).half().double()
        codes = (groups / scale).round().clamp(-middle, middle - 1)
        least = torch.minimum(least, ((codes * scale - groups).square() * h).sum(1))
    best = float(least.sum())
    found = error(values, name, IMPORTANCE, fitted_for=IMPORTANCE)
    assert 0.999 * best < found < 1.02 * best


@pytest.mark.parametrize(("name", "one_scale_a_group"), [("Q4_K", "Q4_1"), ("Q5_K", "Q5_1")])
def test_integers_of_six_bits_cost_little_over_floats_for_every_group(
    name: str, one_scale_a_group: str
) -> None:
    with_integers, with_floats = (
        error(weight(), kind, IMPORTANCE, fitted_for=IMPORTANCE) for kind in (name, one_scale_a_group)
    )
    assert with_integers < 1.1 * with_floats


@pytest.mark.parametrize("name", GRIDS)
def test_zeros_stay_zeros(name: str) -> None:
    values = torch.zeros(2, 512)
    scales = fit_blocks(values, torch.ones(512), GRIDS[name])
    assert torch.equal(scales.weights(scales.codes(values)), values)


@pytest.mark.parametrize("name", GRIDS)
def test_scales_do_not_depend_on_the_threads(name: str) -> None:
    values = weight(600)
    one, two = (fit_blocks(values, IMPORTANCE, GRIDS[name], threads=threads) for threads in (1, 2))
    assert torch.equal(one.scale(), two.scale())
    assert torch.equal(one.low(), two.low())
