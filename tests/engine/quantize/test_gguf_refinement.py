"""Refitted scales against least squares in float64, and what compensation and refinement together gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.compensation import factorize, row_errors
from workers.engine.quantize.gguf_fit import fit_blocks
from workers.engine.quantize.gguf_refinement import encode_compensated, refit_scales
from workers.engine.quantize.gguf_scales import GRIDS, BlockScales

COLUMNS = 256


def problem(rows: int = 6) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of inputs that go together."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(900, COLUMNS, generator=generator) @ torch.randn(
        COLUMNS, COLUMNS, generator=generator
    )
    return torch.randn(rows, COLUMNS, generator=generator), inputs.t() @ inputs / len(inputs)


def fitted(weight: Tensor, moments: Tensor, name: str) -> tuple[Tensor, BlockScales]:
    scales = fit_blocks(weight, moments.diagonal(), GRIDS[name])
    return scales.codes(weight), scales


@pytest.mark.parametrize("name", GRIDS)
def test_compensation_and_refinement_lower_the_error_of_the_outputs(name: str) -> None:
    weight, moments = problem()
    codes, scales = fitted(weight, moments, name)
    factor = factorize(moments, 0.01)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(COLUMNS)
    found = encode_compensated(weight, scales, factor, damped, threads=2)
    before, after = (row_errors(weight - w, moments) for w in (scales.weights(codes), found.weights()))
    assert after.sum() < 0.8 * before.sum()
    assert found.codes.min() >= 0
    assert found.codes.max() < GRIDS[name].levels


def test_scales_are_those_of_least_squares() -> None:
    weight, moments = problem()
    codes, scales = fitted(weight, moments, "Q4_0")
    found = refit_scales(weight, codes, scales, moments)
    root = torch.linalg.cholesky(moments.double())
    for row in range(len(weight)):
        basis = torch.block_diag(*(codes[row].double() - 8).view(-1, 1, 32))
        expected = torch.linalg.lstsq((basis @ root).t(), (weight[row].double() @ root)[:, None]).solution
        torch.testing.assert_close(found.d[row].double(), expected[:, 0], rtol=5e-3, atol=1e-4)
