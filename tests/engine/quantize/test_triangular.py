"""Inverting in place, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from workers.engine.quantize.triangular import invert_lower_


@pytest.mark.parametrize("size", [1, 7, 256, 257, 700])
def test_inverse_is_that_of_torch(size: int) -> None:
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower = (noise / size).tril() + torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.inv(lower)
    # What lies above the diagonal is no part of the matrix.
    given = lower + noise.triu(1)
    invert_lower_(given)
    torch.testing.assert_close(given, expected)
    assert torch.equal(given, given.tril())
