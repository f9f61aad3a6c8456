"""Factoring and inverting in place, against torch in float64; sizes around those of leaves and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.quantize.triangular import factor_lower_, invert_lower_, mirror_upper_, rearrange_

sizes = pytest.mark.parametrize("size", [1, 7, 256, 257, 512, 700, 1100])


def noise(size: int) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@sizes
def test_inverse_is_that_of_torch_and_what_is_above_the_diagonal_stays(size: int) -> None:
    lower = (noise(size) / size).tril() + torch.eye(size, dtype=torch.float64)
    expected, above = torch.linalg.inv(lower), noise(size).triu(1)
    given = lower + above
    invert_lower_(given)
    torch.testing.assert_close(given.tril(), expected.tril())
    assert torch.equal(given.triu(1), above)


@sizes
def test_factor_is_that_of_torch_and_needs_the_lower_triangle_alone(size: int) -> None:
    matrix = noise(size) @ noise(size).t() + torch.eye(size, dtype=torch.float64)
    above = noise(size).triu(1)
    given = matrix.tril() + above
    assert factor_lower_(given)
    torch.testing.assert_close(given.tril(), torch.linalg.cholesky(matrix))
    assert torch.equal(given.triu(1), above)


@pytest.mark.parametrize("at", [0, 3, 600])
def test_a_matrix_that_is_not_positive_definite_has_no_factor(at: int) -> None:
    matrix = torch.eye(700)
    matrix[at, at] = -1
    assert not factor_lower_(matrix)


@sizes
def test_what_is_above_the_diagonal_is_mirrored_with_it(size: int) -> None:
    matrix = noise(size)
    expected = matrix.triu() + matrix.triu(1).t()
    mirror_upper_(matrix)
    assert torch.equal(matrix, expected)


@sizes
def test_rows_and_columns_are_put_in_order(size: int) -> None:
    matrix = noise(size)
    mirror_upper_(matrix)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    expected = matrix[order][:, order]
    rearrange_(matrix, order)
    assert torch.equal(matrix, expected)
