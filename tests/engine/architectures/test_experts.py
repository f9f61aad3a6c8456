"""Experts as layers of their own, and what calibration makes of those that see too little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import EXPERTS, HIDDEN, facts_of, tiny_model
from torch import Tensor, nn

from app.spec.architectures import ARCHITECTURES, is_expert, is_router
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from workers.engine.architectures.experts import SeparateExperts, separate_state
from workers.engine.architectures.loading import load_model
from workers.engine.architectures.names import name_within_base
from workers.engine.architectures.skeleton import BlockCall
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import gather_moments, input_sites
from workers.engine.export.compressed_tensors import read_dequantized
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
MIXTURES = [name for name, architecture in ARCHITECTURES.items() if architecture.expert_layers]


def run(source: Path, target: Path, text: Path, step: QuantizeCalibrated | QuantizeWeights) -> StepOutcome:
    target.mkdir()
    return run_step(
        step,
        StepContext(
            source=source, target=target, original=source, facts=facts_of(source), calibration_text=text
        ),
    )


def layers_of(architecture: str) -> tuple[str, str, str]:
    layers = ARCHITECTURES[architecture].expert_layers
    assert layers is not None
    return layers


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.inference_mode()
def test_separate_experts_compute_what_transformers_fused_ones_do(architecture: str, tiny: Tiny) -> None:
    fused = load_model(tiny(architecture)).base_model.layers[0].mlp.experts
    layers = layers_of(architecture)
    separate = SeparateExperts(fused, layers)
    state = separate_state({f"x.experts.{n}": p for n, p in fused.named_parameters()}, layers)
    separate.load_state_dict({n.removeprefix("x.experts."): p for n, p in state.items()}, assign=True)
    torch.manual_seed(0)
    hidden = torch.randn(17, HIDDEN)
    # The last expert is nobody's.
    weights, chosen = torch.randn(17, EXPERTS - 1).softmax(-1).topk(2)
    torch.testing.assert_close(separate(hidden, chosen, weights), fused(hidden, chosen, weights))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_separate_state_has_the_names_and_values_of_the_file(architecture: str, tiny: Tiny) -> None:
    from safetensors.torch import load_file

    directory = tiny(architecture)
    state = separate_state(load_model(directory).state_dict(), layers_of(architecture))
    stored = load_file(directory / "model.safetensors")
    ours = {name_within_base(name, "model"): value for name, value in state.items()}
    theirs = {name_within_base(name, "model"): value for name, value in stored.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
@torch.inference_mode()
def test_transformers_computes_with_the_dequantized_experts(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny(architecture)
    run(source, tmp_path / "q", tiny_text, QuantizeWeights(bits=4, group_size=16))
    model, tokens = load_model(source), torch.arange(10, 30).view(2, 10)
    before = model(tokens)[0]
    views = {
        name_within_base(name, "model"): value
        for name, value in separate_state(model.state_dict(), layers_of(architecture)).items()
    }
    for name, weight in read_dequantized(tmp_path / "q"):
        views[name_within_base(name, "model")].copy_(weight)
    expected = model(tokens)[0]
    torch.testing.assert_close(load_model(tmp_path / "q")(tokens)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, expected)


def test_routers_stay_as_they_are_and_say_why(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    outcome = run(
        tiny("Qwen2MoeForCausalLM"), tmp_path / "q", tiny_text, QuantizeWeights(bits=8, group_size=16)
    )
    routers = [layer for layer in outcome.layers if is_router(layer.name)]
    # Three blocks with experts and a shared one: two gates each.
    assert len(routers) == 6
    assert {(layer.action, (layer.reason or "")[:8]) for layer in routers} == {("untouched", "a router")}


NAMES = [f"mlp.experts.{number}.w1" for number in range(3)]


class Mixture(nn.Module):
    """Three experts of which the second sees two tokens of each run, and the third none."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"w1": nn.Linear(32, 4, bias=False)}) for _ in range(3)]
        self.mlp = nn.ModuleDict({"experts": nn.ModuleList(layers)})

    def forward(self, inputs: Tensor) -> Tensor:
        for name, tokens in zip(NAMES, (8, 2, 0), strict=True):
            self.get_submodule(name)(inputs[0, :tokens])
        return inputs


@torch.inference_mode()
def test_experts_that_see_too_little_are_given_white_noise() -> None:
    torch.manual_seed(0)
    given = torch.randn(1, 1, 8, 32)
    block = LiveBlock(
        index=0,
        module=Mixture(),
        stored_names={},
        call=BlockCall((), {}),
        inputs=lambda: iter(given),
        windows=1,
        window=given.__getitem__,
        scratch=Path(),
        alive=lambda: None,
    )
    sites = input_sites(block, NAMES)
    gather_moments(block, sites)
    assert [site.layers for site in sites] == [[name] for name in NAMES]
    assert [(site.tokens, site.is_guess) for site in sites] == [(8, False), (2, True), (0, True)]
    assert all(torch.equal(site.second_moment(), torch.eye(32)) for site in sites[1:])


def test_an_expert_without_a_token_is_rounded_to_nearest_and_named(tiny_text: Path, tmp_path: Path) -> None:
    source = tiny_model("MixtralForCausalLM", tmp_path / "source", num_local_experts=32)
    calibrated = QuantizeCalibrated(bits=4, group_size=32, calibration_tokens=128, refinements=0)
    outcome = run(source, tmp_path / "gptq", tiny_text, calibrated)
    run(source, tmp_path / "nearest", tiny_text, QuantizeWeights(bits=4, group_size=32))
    (warning,) = [w for w in outcome.warnings if "experts that saw no token" in w]
    unseen = warning.partition("experts that saw no token: ")[2].partition(";")[0].partition(". Raise")[0]
    names = unseen.split(", ")
    assert all(name.startswith("model.layers.") and ".block_sparse_moe.experts." in name for name in names)
    ours, nearest = (dict(read_dequantized(tmp_path / which)) for which in ("gptq", "nearest"))
    for name in names:
        for layer in layers_of("MixtralForCausalLM"):
            assert torch.equal(ours[f"{name}.{layer}.weight"], nearest[f"{name}.{layer}.weight"])
    # Others were compensated.
    experts = [name for name in ours if is_expert(name)]
    assert not all(torch.equal(ours[name], nearest[name]) for name in experts)
