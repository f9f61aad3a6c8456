"""Factors per channel: that folding changes nothing, and that the right ones are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_calibrated import run
from torch import nn

from app.spec.quantize import QuantizeCalibrated
from workers.engine.architectures.feeding import Feed, feeds_of, fold
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.quantize.channel_factors import (
    SMOOTHING_STRENGTHS,
    awq_factor,
    balanced,
    best_candidate,
    expected_loss,
    smoothing_factor,
)

Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    ("architecture", "feeds"),
    [("LlamaForCausalLM", 4), ("CohereForCausalLM", 2), ("Olmo2ForCausalLM", 2),
     ("Qwen2ForCausalLM", 4), ("Gemma3ForCausalLM", 4), ("Phi3ForCausalLM", 4),
     ("BertModel", 1), ("DistilBertModel", 1), ("MPNetModel", 1)],
)  # fmt: skip
def test_folding_leaves_the_outputs_as_they_are(architecture: str, feeds: int, tiny: Tiny) -> None:
    directory = tiny(architecture)
    model = load_model(directory)
    tokens = load_tokenizer(directory)("The river runs past the old mill.", return_tensors="pt")
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(**tokens)[0]
        for block in blocks:
            found = feeds_of(block)
            assert len(found) == feeds
            for feed in found:
                width = block.get_parameter(f"{feed.layers[0]}.weight").shape[1] // feed.copies
                changed = fold(block, feed, 0.25 + 4 * torch.rand(width, generator=generator))
                assert f"{feed.source}.weight" in changed
        after = model(**tokens)[0]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_heads_that_share_values_take_the_largest_factor_of_their_copies() -> None:
    feed = Feed("v", ("o",), copies=2, head_size=2)
    per_input = torch.tensor([1.0, 2, 3, 1, 5, 6, 4, 7])
    assert feed.shared(per_input).tolist() == [3, 2, 5, 7]
    assert feed.repeated(torch.tensor([3.0, 2, 5, 7])).tolist() == [3, 2, 3, 2, 5, 7, 5, 7]


def test_smoothing_shares_ranges_between_activations_and_weights() -> None:
    inputs, weights = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    factor = smoothing_factor(inputs, weights, 0.5)
    assert factor[0] / factor[1] == pytest.approx(10)
    assert factor[2] == 1


def rounded(values: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """To 8 bits, with the largest magnitude at 127."""
    step = peaks / 127
    return (values / step).round() * step


def with_outliers() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (64, 96) and inputs (512, 96) of which four channels are thirty times the others."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 96, generator=generator)
    inputs[:, ::24] *= 30
    return torch.randn(64, 96, generator=generator), inputs


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_the_loss_that_is_expected_is_what_rounding_costs(strength: float, per_token: bool) -> None:
    weight, inputs = with_outliers()
    factor = smoothing_factor(inputs.abs().amax(0), weight.abs().amax(0), strength)
    scaled, smooth = (weight * factor).double(), (inputs / factor).double()
    peaks = smooth.abs().amax(1, keepdim=True) if per_token else smooth.abs().amax()
    outputs = rounded(smooth, peaks) @ rounded(scaled, scaled.abs().amax(1, keepdim=True)).t()
    cost = (outputs - smooth @ scaled.t()).square().sum() / len(inputs)
    moments = inputs.square().mean(0)
    expected = expected_loss(weight, moments, inputs, factor, per_token=per_token) / (12 * 127**2)
    assert expected == pytest.approx(float(cost), rel=0.15)


def test_outliers_of_the_inputs_are_smoothed_until_the_weights_would_lose_more() -> None:
    weight, inputs = with_outliers()
    losses = [
        expected_loss(
            weight, inputs.square().mean(0), inputs,
            smoothing_factor(inputs.abs().amax(0), weight.abs().amax(0), strength), per_token=True,
        )
        for strength in SMOOTHING_STRENGTHS
    ]  # fmt: skip
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1
    assert losses[best] < 0.2 * losses[0]


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_strength_found_for_each_input_is_used(
    activations: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("LlamaForCausalLM")
    norms = []
    for strength in (None, 0.5):
        step = QuantizeCalibrated(
            bits=8, activations=activations, scaling="smoothquant", smoothing_strength=strength, calibration_tokens=512
        )  # fmt: skip
        run(source, tmp_path / str(strength), tiny_text, step)
        norms.append(
            load_model(tmp_path / str(strength)).get_parameter("model.layers.0.input_layernorm.weight")
        )
    assert not torch.equal(*norms)


def test_channels_that_are_never_used_have_no_factor() -> None:
    moment = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    assert awq_factor(moment, 0.0).tolist() == [1, 1, 1]
    assert awq_factor(moment, 1.0)[0] / awq_factor(moment, 1.0)[2] == pytest.approx(2)
    assert awq_factor(moment, 1.0)[1] == 1
    assert balanced(torch.zeros(2)).tolist() == [1, 1]


def test_candidate_with_the_least_output_error_wins() -> None:
    weight = torch.tensor([[0.4, 3.0]])
    moment = torch.diag(torch.tensor([100.0, 0.01]))
    candidates = [torch.ones(2), torch.tensor([2.5, 1.0]), torch.tensor([1.0, 2.5])]
    # Rounded to integers, 0.4 is lost where it matters unless it is scaled to 1.
    assert best_candidate([(weight, lambda scaled, _: scaled.round())], moment, candidates) == 1


def test_layers_that_nothing_can_be_folded_for_are_named(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    step = QuantizeCalibrated(scaling="awq", solver="nearest", calibration_tokens=128)
    warnings = run(tiny("BertModel"), tmp_path / "out", tiny_text, step).warnings
    assert any("attention.self.query" in warning and "output.dense" in warning for warning in warnings)
    assert not run(tiny("LlamaForCausalLM"), tmp_path / "llama", tiny_text, step).warnings
