"""Refitted scales against least squares in float64, and codes that no single change makes better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.block_fit import fit_blocks
from workers.engine.quantize.block_refinement import descend, refined, refit_scales, row_errors
from workers.engine.quantize.block_scales import GRIDS, BlockScales

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
def test_every_round_lowers_the_error_of_the_outputs(name: str) -> None:
    weight, moments = problem()
    codes, scales = fitted(weight, moments, name)
    better_codes, better = refined(weight, codes, scales, moments)
    before, after = (
        row_errors(weight - s.weights(c), moments) for c, s in ((codes, scales), (better_codes, better))
    )
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()
    assert better_codes.min() >= 0
    assert better_codes.max() < GRIDS[name].levels


def test_scales_are_those_of_least_squares() -> None:
    weight, moments = problem()
    codes, scales = fitted(weight, moments, "Q4_0")
    found = refit_scales(weight, codes, scales, moments)
    root = torch.linalg.cholesky(moments.double())
    for row in range(len(weight)):
        basis = torch.block_diag(*(codes[row].double() - 8).view(-1, 1, 32))
        expected = torch.linalg.lstsq((basis @ root).t(), (weight[row].double() @ root)[:, None]).solution
        torch.testing.assert_close(found.d[row].double(), expected[:, 0], rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q6_K"])
def test_no_single_code_can_be_moved_for_the_better(name: str) -> None:
    weight, moments = problem(rows=2)
    codes, scales = fitted(weight, moments, name)
    for _ in range(30):
        codes = descend(weight, codes, scales, moments)
    least = row_errors((weight - scales.weights(codes)).double(), moments.double())
    for column in range(0, COLUMNS, 7):
        for step in (-1, 1):
            moved = codes.clone()
            moved[:, column] = (moved[:, column] + step).clamp(0, GRIDS[name].levels - 1)
            assert (
                row_errors((weight - scales.weights(moved)).double(), moments.double()) >= least * 0.99999
            ).all()
