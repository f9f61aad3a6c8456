from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from workers.engine.measure.language import Predictions, divergence


def _reference(original: torch.Tensor, result: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Perplexities and divergence by their definitions, in float64 and without slabs."""
    p, q = torch.softmax(original.double(), -1), torch.softmax(result.double(), -1)
    rows = torch.arange(len(targets))
    return {
        "original": float(torch.exp(-p[rows, targets].log().mean())),
        "result": float(torch.exp(-q[rows, targets].log().mean())),
        "kl": float((p * (p / q).log()).sum(-1).mean()),
    }


def test_perplexity_and_divergence_agree_with_their_definitions_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    original, noise = (torch.randn(40, 300, generator=generator) * 3 for _ in range(2))
    result, targets = original + 0.3 * noise, torch.randint(0, 300, (39,), generator=generator)
    predictions = Predictions()
    predictions.add(original, result, targets)
    expected = _reference(original, result, targets)
    assert predictions.perplexities() == pytest.approx((expected["original"], expected["result"]), rel=1e-5)
    assert predictions.divergence_summary()["kl_mean"] == pytest.approx(expected["kl"], rel=1e-4)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    original, result = (torch.randn(33, 50, generator=generator) for _ in range(2))
    targets = torch.randint(0, 50, (32,), generator=generator)
    whole, cut = Predictions(), Predictions()
    whole.add(original, result, targets)
    monkeypatch.setattr("workers.engine.measure.language._SLAB_ELEMENTS", 150)
    cut.add(original, result, targets)
    assert cut.perplexities() == pytest.approx(whole.perplexities())
    assert cut.divergence_summary() == pytest.approx(whole.divergence_summary())
    assert (cut.agreeing, cut.flipped, cut.original_right) == (
        whole.agreeing,
        whole.flipped,
        whole.original_right,
    )


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = torch.randn(5, 20).log_softmax(-1)
    assert divergence(logits, logits).abs().max() < 1e-6


def test_flips_are_counted_among_what_the_original_got_right() -> None:
    # First choices: original 0, 1, 2; result 0, 0, 0; truth 0, 1, 1.
    original = torch.eye(3) * 10
    result = torch.tensor([[10.0, 0, 0]]).repeat(3, 1)
    predictions = Predictions()
    predictions.add(
        torch.cat((original, original[:1])), torch.cat((result, result[:1])), torch.tensor([0, 1, 1])
    )
    assert (predictions.original_right, predictions.flipped) == (2, 1)
    assert (predictions.agreeing, predictions.positions) == (2, 4)


def test_bootstrap_interval_holds_the_difference_and_repeats_with_the_seed() -> None:
    predictions = Predictions(
        original_nll=[100.0, 200.0, 150.0], result_nll=[110.0, 215.0, 155.0], scored=[50, 100, 75]
    )
    middle, low, high = predictions.delta_ln_perplexity(seed=3)
    assert middle == pytest.approx(30 / 225)
    assert low <= middle <= high
    assert low == pytest.approx(5 / 75)
    assert high == pytest.approx(10 / 50)
    assert predictions.delta_ln_perplexity(seed=3) == (middle, low, high)


def test_bits_per_byte_are_bits_over_bytes() -> None:
    predictions = Predictions(original_nll=[math.log(2) * 80], result_nll=[math.log(2) * 160], scored=[10])
    assert predictions.bits_per_byte(40) == pytest.approx((2.0, 4.0))


def test_a_loss_beyond_floats_stays_a_number() -> None:
    predictions = Predictions(original_nll=[1.0], result_nll=[1e6], scored=[1])
    assert np.isfinite(predictions.perplexities()[1])


def test_other_vocabularies_give_no_divergence() -> None:
    predictions = Predictions()
    predictions.add(torch.randn(4, 10), torch.randn(4, 12), torch.tensor([1, 2, 3]))
    assert predictions.divergence_summary() == {}
    assert predictions.positions == 4
