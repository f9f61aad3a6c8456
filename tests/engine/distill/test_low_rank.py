from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS, facts_of

from workers.engine.architectures.loading import load_model
from workers.engine.distill.low_rank import LowRank

IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel", "MixtralForCausalLM"]
)
def test_merged_weights_do_what_the_adapters_did(architecture: str, tiny: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    model = load_model(tiny(architecture))
    with torch.no_grad():
        plain = model(input_ids=IDS)[0]
        adapters = LowRank(model, 3)
        torch.testing.assert_close(model(input_ids=IDS)[0], plain)
        for matrix in adapters.up.values():
            matrix.normal_(std=0.05)
        adapted = model(input_ids=IDS)[0]
        adapters.merge()
        merged = model(input_ids=IDS)[0]
    assert float((adapted - plain).abs().max()) > 1e-3
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_adapters_alone(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("LlamaForCausalLM"))
    adapters = LowRank(model, 3)
    model(input_ids=IDS)[0].square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(float(matrix.grad.abs().max()) > 0 for matrix in adapters.up.values())
    layers = facts_of(tiny("LlamaForCausalLM")).compressible()
    assert len(adapters.up) == len(adapters.down) == len(layers)
    assert len(layers) % BLOCKS == 0
    shapes = {
        name.replace("/", "."): (matrix.shape[0], adapters.down[name].shape[1])
        for name, matrix in adapters.up.items()
    }
    assert shapes == {fact.name: tuple(fact.shape) for fact in layers}
