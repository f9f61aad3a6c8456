from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peers.evaluator import Original, evaluate, round_per_token
from peers.job import block_linears, computed_weight
from quality_int8 import facts_of

from app.spec.quantize import QuantizeWeights
from workers.engine.architectures.loading import load_model
from workers.engine.technique import StepContext, run_step


@pytest.fixture(scope="module")
def original(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Original:
    windows = np.random.default_rng(0).integers(0, 256, size=(3, 32))
    return Original(llama, windows, tmp_path_factory.mktemp("cache"))


def quantized(llama: Path, target: Path, bits: int) -> Path:
    target.mkdir()
    step = QuantizeWeights.model_validate({"bits": bits, "group_size": 32})
    run_step(step, StepContext(source=llama, target=target, original=llama, facts=facts_of(llama)))
    return target


def test_a_model_is_its_own_equal(llama: Path, original: Original) -> None:
    quality = evaluate(llama, original, int8_activations=False)
    assert quality.kl_max < 1e-6
    assert quality.delta_ln_perplexity == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1


def test_fewer_bits_are_farther_from_the_original(llama: Path, original: Original, tmp_path: Path) -> None:
    by_bits = [
        evaluate(quantized(llama, tmp_path / str(bits), bits), original, int8_activations=False).kl_mean
        for bits in (8, 4, 2)
    ]
    assert 0 < 20 * by_bits[0] < by_bits[1] < by_bits[2]


def test_rounding_activations_moves_the_outputs(llama: Path, original: Original) -> None:
    assert evaluate(llama, original, int8_activations=True).kl_mean > 0


def test_cached_states_give_the_originals_logits(llama: Path, original: Original) -> None:
    window = torch.from_numpy(original.windows[1])[None]
    with torch.inference_mode():
        logits = load_model(llama)(window).logits[0]
    torch.testing.assert_close(original.logits(1), logits)


def test_activations_keep_eight_bits_per_token() -> None:
    values = (
        torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    )
    rounded = round_per_token(values)
    step = values.abs().amax(dim=1, keepdim=True) / 127.5
    # The largest value is half a step beyond the last level.
    assert ((rounded - values).abs() <= 0.5001 * step).all()
    assert torch.allclose(rounded / step, (rounded / step).round(), atol=1e-4)


def test_a_token_of_zeros_stays_so() -> None:
    assert round_per_token(torch.zeros(2, 8)).eq(0).all()


def test_the_weight_a_layer_computes_by_is_found_exactly(llama: Path) -> None:
    layers = block_linears(load_model(llama))
    assert len(layers) == 14
    for layer in layers.values():
        assert torch.equal(computed_weight(layer, layer.in_features), layer.weight)
