"""Scales of the key-value cache: what they are, how they are stored, and that a loader rounds by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from technique_runs import Case, context_for, run_case, tensors_of
from tiny_models import BLOCKS, facts_of, tiny_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, DynamicCache

from app.spec.architectures import ARCHITECTURES
from app.spec.kv_cache import can_scale_cache
from app.spec.quantize import QuantizeCalibrated
from app.spec.sizes import Shape, after_step
from workers.engine.calibration.step_calibration import calibration_windows
from workers.engine.measure.results import Loading
from workers.engine.measure.runner_torch import TorchRunner

# What compressed-tensors and transformers say of each other while loading.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]
STEP = QuantizeCalibrated(group_size=16, kv_cache="fp8", calibration_tokens=256)
SCALED = [name for name, architecture in ARCHITECTURES.items() if can_scale_cache(architecture)]
# Keys straight from their projection, after a norm and in sliding windows, and from a joint projection.
UNLIKE = ("LlamaForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM")
EACH = pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in UNLIKE else [pytest.mark.slow]) for name in SCALED],
)


@pytest.fixture(scope="module")
def quantized(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The result of STEP on the tiny model of an architecture, made once."""
    made: dict[str, Path] = {}

    def directory_of(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("quantized")
            run_case(Case(STEP, architecture, "cache"), tiny(architecture), made[architecture], tiny_text)
        return made[architecture]

    return directory_of


@EACH
def test_scales_are_the_largest_key_and_value_of_a_plain_forward_in_float64(
    architecture: str, tiny: Callable[[str], Path], tiny_text: Path, quantized: Callable[[str], Path]
) -> None:
    case, source = Case(STEP, architecture, "cache"), tiny(architecture)
    context = context_for(case.step, source, source, tiny_text)
    windows = calibration_windows(context, tokens=STEP.calibration_tokens, length=STEP.sequence_length)
    cache = DynamicCache()
    with torch.no_grad():
        _unpacked(quantized(architecture)).double()(windows, past_key_values=cache, use_cache=True)
    tensors = tensors_of(quantized(architecture))
    for index, layer in enumerate(cache.layers):
        assert layer.keys.dtype == torch.float64
        for which, states in (("k", layer.keys), ("v", layer.values)):
            scale = tensors[f"model.layers.{index}.self_attn.{which}_scale"]
            assert scale.shape == (1,)
            assert scale.item() == pytest.approx(states.abs().max().item() / 448, rel=1e-5)


@EACH
def test_loader_finds_every_scale_and_rounds_the_cache_by_it(
    architecture: str, quantized: Callable[[str], Path]
) -> None:
    directory, window = quantized(architecture), np.arange(20, 84)
    runner = TorchRunner(directory, device="cpu", threads=1)
    assert runner.facts.loading == Loading()
    assert runner.facts.runtime.endswith("the rounding of keys and values simulated")
    model, rounding = _unpacked(directory), RoundingCache(tensors_of(directory))
    with torch.no_grad():
        expected = model(torch.from_numpy(window)[None], past_key_values=rounding, use_cache=True).logits[0]
        plain = model(torch.from_numpy(window)[None]).logits[0]
    torch.testing.assert_close(torch.from_numpy(runner.outputs(window)), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-3


def test_cached_tokens_are_rounded_once_and_continue_as_the_whole_text_does(
    quantized: Callable[[str], Path],
) -> None:
    runner = TorchRunner(quantized("LlamaForCausalLM"), device="cpu", threads=1)
    text = list(range(20, 40))
    continued = runner.generate(text, new_tokens=4)
    for token in continued:
        assert token == runner.outputs(np.array(text))[-1].argmax()
        text.append(token)


def test_scales_and_their_bytes_are_planned_from_shapes_alone(
    tiny: Callable[[str], Path], quantized: Callable[[str], Path]
) -> None:
    facts = facts_of(tiny("Phi3ForCausalLM"))
    planned = after_step(STEP, Shape.of(facts.tensors), facts, {})
    written = facts_of(quantized("Phi3ForCausalLM")).tensors
    assert set(planned.tensors) == set(written)
    assert sum(tensor.name.endswith(("k_scale", "v_scale")) for tensor in written) == 2 * BLOCKS


def test_scales_have_the_dtype_of_the_checkpoint_and_no_layer_need_be_quantized(
    tiny_text: Path, tmp_path: Path
) -> None:
    source, target = (
        tiny_model("LlamaForCausalLM", tmp_path / "source", dtype=torch.bfloat16),
        tmp_path / "target",
    )
    target.mkdir()
    step = STEP.model_copy(update={"ignore": ("*.layers.0.*",)})
    run_case(Case(step, "LlamaForCausalLM", "cache"), source, target, tiny_text)
    tensors = tensors_of(target)
    assert "model.layers.0.self_attn.k_proj.weight" in tensors
    assert tensors["model.layers.0.self_attn.k_scale"].dtype == torch.bfloat16


def test_config_declares_what_servers_accept(quantized: Callable[[str], Path]) -> None:
    config = json.loads((quantized("LlamaForCausalLM") / "config.json").read_text())
    scheme = CompressedTensorsConfig(**config["quantization_config"]).quantization_config.kv_cache_scheme
    # What vLLM's CompressedTensorsKVCacheMethod checks.
    assert (scheme.type, scheme.num_bits, scheme.strategy) == ("float", 8, "tensor")
    assert scheme.symmetric
    assert not scheme.dynamic


class RoundingCache(DynamicCache):
    """Keeps what E4M3 makes of keys and values by a checkpoint's scales."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention = f"model.layers.{layer_idx}.self_attn"
        rounded = [
            (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            for states, scale in (
                (keys, self.tensors[f"{attention}.k_scale"]),
                (values, self.tensors[f"{attention}.v_scale"]),
            )
        ]
        return super().update(*rounded, layer_idx)


def _unpacked(directory: Path) -> torch.nn.Module:
    """The model with weights as they are used and its cache as it is without scales."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
