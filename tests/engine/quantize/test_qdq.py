from __future__ import annotations

import pytest
import torch

from workers.engine.quantize.qdq import nearest_rows, smoothing_factors

_GENERATOR = torch.Generator().manual_seed(1)


def test_smoothing_is_the_formula_of_smoothquant() -> None:
    inputs, weights = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([[1.0, -2.0, 5.0], [-0.5, 0.25, 1.0]])
    factors = smoothing_factors(inputs, [weights[:1], weights[1:]], 0.5)
    assert factors.tolist() == pytest.approx([(4 / 1) ** 0.5, (9 / 2) ** 0.5, 1.0])
    assert smoothing_factors(inputs, [weights], 0.0).tolist() == [1.0, 1.0, 1.0]


def test_rows_of_qdq_weights_have_positive_scales_and_the_nearest_codes() -> None:
    weight = torch.randn(5, 30, generator=_GENERATOR)
    weight[2] = 0
    fit = nearest_rows(weight)
    assert (fit.scale > 0).all()
    assert ((fit.restored() - weight).abs() <= fit.scale / 2 * 1.0001).all()
    assert fit.codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
