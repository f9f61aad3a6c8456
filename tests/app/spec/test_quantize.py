"""Parameters of quantization: what follows from a format, what contradicts it, and what does not fit a model."""

from __future__ import annotations

from typing import Any

import pytest
from job_support import make_facts
from pydantic import ValidationError

from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights


@pytest.mark.parametrize(
    ("number_format", "implied"),
    [("int", (4, None)), ("fp8", (8, None)), ("mxfp4", (4, 32)), ("nvfp4", (4, 16)), ("nf4", (4, 64))],
)
def test_the_format_implies_bits_and_groups_and_what_is_written_out_reads_back(
    number_format: Any, implied: tuple[int, int | None]
) -> None:
    step = QuantizeWeights(number_format=number_format)
    assert (step.bits, step.group_size) == implied
    assert QuantizeWeights.model_validate(step.model_dump()) == step


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"number_format": "fp8", "bits": 4}, "bits: fp8 has 8"),
        ({"number_format": "nvfp4", "group_size": 32}, "group_size: nvfp4 takes 16"),
        ({"number_format": "mxfp4", "symmetric": False}, "symmetric: mxfp4 has no zero points"),
        ({"number_format": "fp8", "group_size": 128}, "group_size: fp8 takes null, tensor, block"),
        ({"number_format": "fp8", "overrides": [{"layers": "*", "bits": 4}]}, "overrides: they change integers only"),
        ({"group_size": "tensor"}, "group_size: tensor is for fp8"),
        ({"activations": "dynamic"}, "activations: with integers, runtimes take 8 bits"),
        ({"bits": 8, "activations": "dynamic", "overrides": [{"layers": "*", "bits": 8}]}, "overrides: with activ"),
        ({"number_format": "fp8", "group_size": "block", "activations": "static"}, "activations: static needs"),
        ({"number_format": "mxfp4", "activations": "static"}, "activations: static needs"),
        ({"number_format": "fp8", "include_head": True}, "include_head: vLLM runs the head in integers"),
        ({"bits": 8, "activations": "dynamic", "include_head": True}, "include_head: vLLM runs"),
        ({"number_format": "nf4", "activations": "dynamic"}, "activations: bitsandbytes rounds no inputs"),
        ({"number_format": "nf4", "group_size": 128}, "group_size: nf4 takes 64"),
        ({"number_format": "nf4", "kv_cache": "fp8"}, "kv_cache: bitsandbytes"),
        ({"number_format": "nf4", "solver": "signround"}, "solver: signround"),
        ({"double_quantized": True}, "double_quantized: int has no scales of scales"),
        ({"symmetric": False, "kv_cache": "fp8"}, "kv_cache: .*symmetric"),
        ({"overrides": [{"layers": "*", "symmetric": False}], "kv_cache": "fp8"}, "kv_cache: .*symmetric"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_field_and_the_reason(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        QuantizeCalibrated(**given)


@pytest.mark.parametrize(
    "given",
    [{"bits": 8, "activations": "static"}, {"number_format": "nvfp4", "activations": "dynamic"}],
)
def test_what_needs_a_range_of_inputs_needs_calibration(given: dict[str, Any]) -> None:
    QuantizeCalibrated(**given)
    with pytest.raises(ValidationError, match=r"use quantize\.calibrated"):
        QuantizeWeights(**given)


@pytest.mark.parametrize(
    ("inputs", "size"), [((4096, 11008), 128), ((576, 1536), 64), ((288, 768), 32), ((100, 64), None)]
)
def test_auto_is_the_largest_size_that_divides_every_layer(inputs: tuple[int, ...], size: int | None) -> None:
    step = QuantizeWeights(group_size="auto").with_group_size_for(inputs)
    assert step.group_size == step.settings_of("x").group_size == size


def faults(**given: Any) -> dict[str, str]:
    spec = CompressionSpec(steps=(QuantizeWeights(**given),))
    return {fault.pointer: fault.detail for fault in check_spec(spec, make_facts())}


def test_an_override_that_matches_nothing_is_a_fault() -> None:
    found = faults(overrides=[{"layers": "*up_proj", "bits": 8}, {"layers": "*nothing", "bits": 8}])
    assert list(found) == ["/steps/0/overrides/1/layers"]
    assert "model.layers.0." in found["/steps/0/overrides/1/layers"]


def test_groups_of_an_override_must_divide_its_own_layers_alone() -> None:
    assert not faults(group_size=32, overrides=[{"layers": "*down_proj", "group_size": 128}])
    found = faults(group_size=32, overrides=[{"layers": "*up_proj", "group_size": 128}])
    assert list(found) == ["/steps/0/overrides"]
    assert "128 does not divide the inputs of model.layers.0.mlp.up_proj (64)" in found["/steps/0/overrides"]


def test_formats_with_groups_of_their_own_say_which_layers_they_do_not_fit() -> None:
    found = faults(number_format="fp8", group_size="block")
    assert (
        "Needs inputs divisible by 128, unlike model.layers.0.self_attn.q_proj (64)"
        in found["/steps/0/group_size"]
    )
    assert not faults(number_format="mxfp4")
    assert not faults(number_format="nvfp4")


def test_zero_points_cannot_be_mixed_with_other_settings() -> None:
    found = faults(symmetric=False, overrides=[{"layers": "*up_proj", "bits": 8}])
    assert list(found) == ["/steps/0/overrides"]
    assert not faults(symmetric=False, overrides=[{"layers": "*", "bits": 8}])


def test_nf4_is_written_for_bitsandbytes_and_where_its_blocks_do_not_fit_it_is_refused() -> None:
    spec = CompressionSpec(steps=(QuantizeWeights(number_format="nf4"),))
    assert spec.output_format == "bitsandbytes"
    assert CompressionSpec(steps=(QuantizeWeights(),)).output_format == "compressed-tensors"
    (gpt2,) = check_spec(spec, make_facts(architecture="GPT2LMHeadModel"))
    assert gpt2.pointer == "/steps/0/number_format"
    assert "use quantize.weights with int" in gpt2.detail
