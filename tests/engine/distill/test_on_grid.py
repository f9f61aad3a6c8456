from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from workers.engine.architectures.loading import load_model
from workers.engine.distill.blocks import recompute_activations
from workers.engine.distill.on_grid import OnGrid

IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel", "GPT2LMHeadModel"])
def test_settled_weights_do_what_rounded_ones_did(architecture: str, tiny: Callable[[str], Path]) -> None:
    model, plain = load_model(tiny(architecture)), load_model(tiny(architecture))
    grid = OnGrid(model, bits=4, group_size=16, dtype=torch.float32)
    with torch.no_grad():
        rounded = model(input_ids=IDS)[0]
        names = [name for name, _ in model.named_parameters()]
        grid.settle()
        settled = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert names == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(settled)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS)[0], rounded)
        # Rounded again they are what they are.
        torch.testing.assert_close(model(input_ids=IDS)[0], rounded)


def test_gradients_pass_as_if_nothing_had_been_rounded(tiny: Callable[[str], Path]) -> None:
    model, settled = load_model(tiny("LlamaForCausalLM")), load_model(tiny("LlamaForCausalLM"))
    OnGrid(settled, bits=4, group_size=16, dtype=torch.float32).settle()
    OnGrid(model, bits=4, group_size=16, dtype=torch.float32)
    for each in (model, settled):
        each(input_ids=IDS)[0].square().mean().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), settled.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_recomputed_activations_are_rounded_too(tiny: Callable[[str], Path]) -> None:
    gradients = []
    for recompute in (False, True):
        model = load_model(tiny("LlamaForCausalLM"))
        OnGrid(model, bits=4, group_size=16, dtype=torch.float32)
        if recompute:
            recompute_activations(model)
        model(input_ids=IDS)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
