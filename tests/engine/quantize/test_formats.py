"""Every format of compressed-tensors from a whole model to the loaders its users have, inputs rounded and not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_weights import assert_computes_with_dequantized_weights, outputs
from tiny_models import facts_of, tiny_model
from torch import Tensor

from app.errors import InvalidRequest
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from workers.engine.architectures.loading import load_model
from workers.engine.export.compressed_tensors import read_dequantized, read_schemes
from workers.engine.measure.results import Loading
from workers.engine.measure.runner_torch import TorchRunner
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
# transformers says that it heeds what it is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"number_format": "fp8"},
    "fp8-tensor": {"number_format": "fp8", "group_size": "tensor"},
    "mxfp4": {"number_format": "mxfp4"},
    "nvfp4": {"number_format": "nvfp4"},
}
TOKENS = np.arange(10, 30)


def run(
    source: Path, target: Path, step: QuantizeWeights | QuantizeCalibrated, text: Path | None
) -> StepOutcome:
    target.mkdir()
    context = StepContext(
        source=source,
        target=target,
        original=source,
        facts=facts_of(source),
        calibration_text=text if step.needs_calibration else None,
    )
    return run_step(step, context)


@pytest.mark.parametrize("given", FORMATS.values(), ids=FORMATS)
def test_transformers_computes_with_the_dequantized_weights(
    given: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny("LlamaForCausalLM")
    run(source, tmp_path / "q", QuantizeWeights(**given), None)
    assert_computes_with_dequantized_weights(source, tmp_path / "q")


def test_blocks_are_read_as_blocks(tmp_path: Path) -> None:
    # 192 rows: the last block of a weight is cut.
    source = tiny_model(
        "LlamaForCausalLM", tmp_path / "m", hidden_size=128, intermediate_size=384, head_dim=32
    )
    run(source, tmp_path / "q", QuantizeWeights(number_format="fp8", group_size="block"), None)
    assert_computes_with_dequantized_weights(source, tmp_path / "q")
    scales = load_file(tmp_path / "q/model.safetensors")
    assert scales["model.layers.0.mlp.down_proj.weight_scale"].shape == (1, 3)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel"])
def test_layers_stored_in_different_bits_load_each_as_it_is(
    architecture: str, tiny: Tiny, tmp_path: Path
) -> None:
    overrides = ({"layers": "*.1.*", "bits": 8}, {"layers": "*.output.dense", "group_size": "channel"})
    step = QuantizeWeights.model_validate({"bits": 3, "group_size": 16, "overrides": overrides})
    run(tiny(architecture), tmp_path / "q", step, None)
    schemes = read_schemes(tmp_path / "q")
    assert schemes is not None
    assert {scheme.bits for scheme in schemes.by_target.values()} == {3, 8}
    assert_computes_with_dequantized_weights(tiny(architecture), tmp_path / "q")
    # The measuring process must not take one scheme for all either.
    expected = outputs(tmp_path / "q")[:1].flatten(0, 1)
    measured = TorchRunner(tmp_path / "q", device="cpu", threads=1).outputs(np.arange(10, 20))
    torch.testing.assert_close(torch.from_numpy(measured), expected, rtol=1e-4, atol=1e-5)


def test_zero_points_beside_other_settings_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    step = QuantizeWeights.model_validate(
        {"bits": 4, "symmetric": False, "overrides": [{"layers": "*up_proj", "bits": 8}]}
    )
    with pytest.raises(InvalidRequest, match="zero points") as caught:
        run(tiny("LlamaForCausalLM"), tmp_path / "q", step, None)
    assert caught.value.code == "mixed_zero_points"


def test_different_bits_for_layers_that_run_as_one_are_warned_of(tiny: Tiny, tmp_path: Path) -> None:
    step = QuantizeWeights.model_validate({"overrides": [{"layers": "*.v_proj", "bits": 8}]})
    outcome = run(tiny("LlamaForCausalLM"), tmp_path / "q", step, None)
    assert (
        "self_attn.k_proj, model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj and 3 more as one"
        in outcome.warnings[0]
    )


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ({"number_format": "fp8", "group_size": "tensor"}, "weight_scale"),
        ({"number_format": "nvfp4"}, "weight_global_scale"),
    ],
)
def test_layers_that_run_as_one_share_the_scale_of_the_whole_weight(
    given: dict[str, Any], scale: str, calibrated: bool, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    step = QuantizeCalibrated(calibration_tokens=256, **given) if calibrated else QuantizeWeights(**given)
    run(tiny("LlamaForCausalLM"), tmp_path / "q", step, tiny_text)
    stored = load_file(tmp_path / "q/model.safetensors")
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        found = [
            t.item()
            for n, t in stored.items()
            if n.endswith(scale) and ".0." in n and n.split(".")[-2] in parts
        ]
        assert len(found) == len(parts)
        assert len(set(found)) == 1
    assert len({t.item() for n, t in stored.items() if n.endswith(scale)}) > 4


INPUTS: dict[str, dict[str, Any]] = {
    "w8a8-dynamic": {"bits": 8, "activations": "dynamic"},
    "w8a8-static": {"bits": 8, "activations": "static"},
    "fp8-dynamic": {"number_format": "fp8", "activations": "dynamic"},
    "fp8-static": {"number_format": "fp8", "group_size": "tensor", "activations": "static"},
    "mxfp4": {"number_format": "mxfp4", "activations": "dynamic"},
    "nvfp4": {"number_format": "nvfp4", "activations": "dynamic"},
}


@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS)
def test_what_is_measured_has_its_inputs_rounded(
    given: dict[str, Any], tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("LlamaForCausalLM")
    run(source, tmp_path / "q", QuantizeCalibrated(calibration_tokens=256, **given), tiny_text)
    runner = TorchRunner(tmp_path / "q", device="cpu", threads=1)
    assert "rounding of inputs simulated" in runner.facts.runtime
    assert runner.facts.loading == Loading()
    schemes, stored = read_schemes(tmp_path / "q"), load_file(tmp_path / "q/model.safetensors")
    assert schemes is not None
    model = load_model(source)
    weights = dict(read_dequantized(tmp_path / "q"))
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or f"{name}.weight_scale" not in stored:
            continue
        kept = weights[f"{name}.weight"]
        module.weight.data = kept.bfloat16().float() if "fp4" in schemes.of(name).format else kept
        local = {what: t for n, t in stored.items() for stem, _, what in [n.rpartition(".")] if stem == name}
        module.register_forward_pre_hook(rounding(schemes.of(name).inputs or {}, local))
    with torch.inference_mode():
        expected = model(torch.from_numpy(TOKENS)[None])[0][0]
    measured = torch.from_numpy(runner.outputs(TOKENS))
    # A sum in another order may round one input the other way; that is small beside what rounding inputs does.
    off = (measured - expected).norm() / expected.norm()
    assert off < 0.1 * (measured - torch.from_numpy(unrounded(source, weights))).norm() / expected.norm()


def unrounded(source: Path, weights: dict[str, Tensor]) -> np.ndarray:
    return outputs_of(source, weights).numpy()


def outputs_of(source: Path, weights: dict[str, Tensor]) -> Tensor:
    model = load_model(source)
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].data = weight.float()
    with torch.inference_mode():
        result: Tensor = model(torch.from_numpy(TOKENS)[None])[0][0]
    return result


def rounding(
    scheme: dict[str, Any], stored: dict[str, Tensor]
) -> Callable[[Any, tuple[Tensor, ...]], Tensor]:
    """Inputs as the scheme says they are rounded, by its definition: (…, tokens, features)."""
    top = {"int": 127.5, "float": {8: 448.0, 4: 6.0}.get(scheme["num_bits"])}[scheme["type"]]

    def hook(_: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        groups = inputs[0].unflatten(-1, (-1, scheme["group_size"] or inputs[0].shape[-1]))
        scale = groups.abs().amax(-1, keepdim=True) / top
        if scheme["dynamic"] == "local":
            overall = stored["input_global_scale"]
            scale = (scale * overall).to(torch.float8_e4m3fn).float() / overall
        elif scheme["strategy"] == "group":
            # The power of two under the largest, which counts as the next from 7 of 4 to 8 on.
            scale = torch.exp2(torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True) * 8 / 7))) / 4
        elif not scheme["dynamic"]:
            scale = stored["input_scale"].float()
        return (levels(groups / scale, scheme) * scale).flatten(-2)

    return hook


def levels(exact: Tensor, scheme: dict[str, Any]) -> Tensor:
    if scheme["type"] == "int":
        return exact.round().clamp(-128, 127)
    if scheme["num_bits"] == 8:
        return exact.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = (exact.abs().unsqueeze(-1) - table).abs() + 1e-6 * (torch.arange(8) % 2)
    return table[distance.argmin(-1)] * exact.sign()


def test_a_fixed_scale_of_inputs_is_their_largest_over_the_text(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    step = QuantizeCalibrated(bits=8, activations="static", calibration_tokens=256)
    run(tiny("LlamaForCausalLM"), tmp_path / "q", step, tiny_text)
    stored = load_file(tmp_path / "q/model.safetensors")
    scales = {n: t.item() for n, t in stored.items() if n.endswith("input_scale")}
    assert len(scales) == 4 * 7
    shared = {scales[f"model.layers.0.self_attn.{part}_proj.input_scale"] for part in "qkv"}
    assert len(shared) == 1
    assert len(set(scales.values())) == 4 * 4
    assert all(value > 0 for value in scales.values())
