"""What an architecture's layout rules out is refused before a job starts, with words that say what would work."""

from __future__ import annotations

from typing import Any

import pytest

from app.spec.architectures import ARCHITECTURES
from app.spec.base import Step
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts, TensorFact
from app.spec.gguf import QuantizeGguf
from app.spec.optimize import OptimizeOnnx
from app.spec.plan import plan_job
from app.spec.prune import PruneCalibrated, PruneMagnitude, PruneWidth
from app.spec.quantize import LayerOverride, QuantizeCalibrated, QuantizeWeights
from app.spec.quantize_dynamic import QuantizeDynamic
from app.spec.quantize_onnx import QuantizeOnnx

HIDDEN, INNER, EXPERTS = 64, 128, 4
EXPERTS_IN_8 = LayerOverride(layers="*.w2", bits=8)


def facts(architecture: str, shapes: dict[str, tuple[int, ...]], **more: int) -> ModelFacts:
    """Two blocks, each of these weights."""
    named = {f"{name.replace('#', str(n))}": shape for name, shape in shapes.items() for n in (0, 1)}
    tensors = tuple(TensorFact(name=name, dtype="F32", shape=shape) for name, shape in named.items())
    return ModelFacts(
        format="safetensors",
        architecture=architecture,
        family=ARCHITECTURES[architecture].family,
        parameters=sum(t.elements for t in tensors),
        dtype="F32",
        weight_bytes=sum(t.nbytes for t in tensors),
        hidden_size=HIDDEN,
        num_blocks=2,
        vocab_size=320,
        max_positions=128,
        tensors=tensors,
        **more,
    )


def mixture(experts_per_token: int = 1) -> ModelFacts:
    expert = "model.layers.#.block_sparse_moe.experts"
    layers = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    shapes = {f"{expert}.{e}.{name}.weight": shape for e in range(EXPERTS) for name, shape in layers.items()}
    others = {
        "model.layers.#.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
        "model.layers.#.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    }
    return facts("MixtralForCausalLM", shapes | others, experts_per_token=experts_per_token)


def gpt2() -> ModelFacts:
    # 66 outputs and 64 inputs.
    return facts("GPT2LMHeadModel", {"transformer.h.#.attn.c_attn.weight": (HIDDEN, 66)})


def faults(step: Step, model: ModelFacts) -> dict[str, str]:
    return {fault.pointer: fault.detail for fault in check_spec(CompressionSpec(steps=(step,)), model)}


@pytest.mark.parametrize(
    "step",
    [
        QuantizeWeights(group_size=32),
        QuantizeCalibrated(group_size=32),
        QuantizeWeights(ignore=("*.self_attn.*",)),
        PruneMagnitude(ignore=("*.experts.0.*",)),
    ],
    ids=str,
)
def test_mixtures_are_quantized_symmetrically_and_pruned_as_one_likes(step: Step) -> None:
    assert faults(step, mixture()) == {}


@pytest.mark.parametrize(
    ("step", "pointer", "words"),
    [
        (QuantizeWeights(symmetric=False), "/steps/0/symmetric", "leave symmetric true"),
        (QuantizeCalibrated(ignore=("*.layers.0.*",)), "/steps/0/ignore/0", "only if all"),
        (QuantizeWeights(ignore=("*.q_proj", "*.w2")), "/steps/0/ignore/1", "only if all"),
        (QuantizeWeights(overrides=(EXPERTS_IN_8,)), "/steps/0/overrides/0", "all experts"),
        (OptimizeOnnx(), "/steps/0/technique", "every expert"),
        (QuantizeOnnx(), "/steps/0/technique", "every expert"),
        (QuantizeDynamic(), "/steps/0/technique", "nn.Linear"),
        (PruneWidth(), "/steps/0/technique", "prune.depth"),
    ],
    ids=str,
)
def test_what_no_runtime_reads_of_a_mixture_is_refused(step: Step, pointer: str, words: str) -> None:
    found = faults(step, mixture())
    assert list(found) == [pointer]
    assert words in found[pointer]


def test_a_pattern_for_routers_alone_matches_no_layer() -> None:
    assert list(faults(QuantizeWeights(ignore=("*.gate",)), mixture())) == ["/steps/0/ignore/0"]


def test_transposed_weights_are_rounded_to_nearest_alone() -> None:
    assert faults(QuantizeWeights(), gpt2()) == {}
    for step in (QuantizeCalibrated(), QuantizeOnnx(), QuantizeDynamic()):
        assert "quantize.weights" in faults(step, gpt2())["/steps/0/technique"]


@pytest.mark.parametrize(
    ("step", "misfit"),
    [
        (PruneMagnitude(pattern="2:4"), 66),
        (PruneCalibrated(pattern="2:4"), 66),
        (PruneCalibrated(pattern="4:8"), 68),
    ],
    ids=str,
)
def test_patterns_count_the_inputs_of_transposed_weights(step: Step, misfit: int) -> None:
    assert faults(step, gpt2()) == {}
    turned = facts("GPT2LMHeadModel", {"transformer.h.#.attn.c_attn.weight": (misfit, HIDDEN)})
    assert "/steps/0/pattern" in faults(step, turned)


def test_time_follows_the_weights_a_token_meets_and_memory_follows_all() -> None:
    one, all_of_them = mixture(1), mixture(EXPERTS)
    assert all_of_them.active_share() == 1.0
    experts = 3 * EXPERTS * HIDDEN * INNER
    rest = HIDDEN * HIDDEN + EXPERTS * HIDDEN
    assert one.active_share() == pytest.approx((experts / EXPERTS + rest) / (experts + rest))
    spec = CompressionSpec(steps=(QuantizeCalibrated(calibration_tokens=10_000_000),))
    plans = [plan_job(spec, model) for model in (one, all_of_them)]
    assert plans[0].seconds < plans[1].seconds
    assert plans[0].peak_memory_bytes == plans[1].peak_memory_bytes


@pytest.mark.parametrize(
    "step",
    [QuantizeGguf(), QuantizeCalibrated(), PruneCalibrated(), QuantizeOnnx(), PruneWidth()],
    ids=str,
)
def test_memory_of_a_calibrated_step_follows_the_widest_input(step: Step) -> None:
    def model(inner: int) -> ModelFacts:
        layers = "model.layers.#."
        shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (HIDDEN, inner)}
        return facts("LlamaForCausalLM", {f"{layers}{name}.weight": shape for name, shape in shapes.items()})

    def peak(inner: int) -> int:
        return plan_job(CompressionSpec(steps=(step,)), model(inner)).stages[2].peak_memory_bytes

    # The second moment of the wide input alone.
    assert peak(64 * INNER) - peak(INNER) > 4 * (64 * INNER) ** 2


def test_routers_keep_their_size() -> None:
    spec = CompressionSpec(steps=(QuantizeWeights(bits=8),))
    model = mixture()
    layers = [t for t in model.compressible() if "gate" not in t.name]
    routers = 4 * 2 * EXPERTS * HIDDEN
    plan = plan_job(spec, model)
    assert plan.output_bytes > sum(t.elements for t in layers) + routers


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        ({"number_format": "nvfp4"}, "/steps/0/number_format"),
        ({"number_format": "fp8", "group_size": "tensor"}, "/steps/0/number_format"),
        ({"bits": 8, "activations": "dynamic"}, "/steps/0/activations"),
    ],
)
def test_experts_are_stored_as_transformers_reads_them(given: dict[str, Any], pointer: str) -> None:
    assert list(faults(QuantizeWeights(**given), mixture())) == [pointer]
    assert not faults(QuantizeWeights(number_format="fp8"), mixture())


def test_what_is_unpacked_while_it_is_loaded_has_one_setting_and_no_rounded_inputs() -> None:
    mixed = QuantizeWeights.model_validate({"overrides": [{"layers": "*c_attn", "bits": 8}]})
    assert list(faults(mixed, gpt2())) == ["/steps/0/overrides"]
    assert list(faults(QuantizeWeights(bits=8, activations="dynamic"), gpt2())) == ["/steps/0/activations"]
    assert not faults(QuantizeWeights(number_format="fp8"), gpt2())


def test_scales_of_the_cache_are_refused_where_they_were_not_tried() -> None:
    step = QuantizeCalibrated(kv_cache="fp8")
    llama = facts("LlamaForCausalLM", {"model.layers.#.self_attn.k_proj.weight": (HIDDEN, HIDDEN)})
    assert faults(step, llama) == {}
    assert "not for Mixtral" in faults(step, mixture())["/steps/0/kv_cache"]
    encoder = facts("BertModel", {"encoder.layer.#.output.dense.weight": (HIDDEN, HIDDEN)})
    assert list(faults(step, encoder)) == ["/steps/0/kv_cache"]
