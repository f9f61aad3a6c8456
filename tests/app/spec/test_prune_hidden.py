"""A smaller hidden width: how small it becomes, what is refused, and what later steps and a plan know of it."""

from __future__ import annotations

import pytest

from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family, Step
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts, TensorFact
from app.spec.gguf import QuantizeGguf
from app.spec.plan import plan_job
from app.spec.prune import PruneCalibrated, PruneHeads, PruneMagnitude
from app.spec.prune_hidden import PruneHidden, hidden_axis, with_hidden_width
from app.spec.quantize import QuantizeWeights

HIDDEN, HEADS, HEAD, WIDTH, VOCABULARY = 576, 9, 64, 1536, 320


def facts(architecture: str = "LlamaForCausalLM", *, hidden: int = HIDDEN, dtype: str = "F32") -> ModelFacts:
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, hidden), "self_attn.k_proj": (3 * HEAD, hidden), "self_attn.v_proj": (3 * HEAD, hidden),
        "self_attn.o_proj": (hidden, HEADS * HEAD), "mlp.gate_proj": (WIDTH, hidden), "mlp.up_proj": (WIDTH, hidden),
        "mlp.down_proj": (hidden, WIDTH), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    tensors = [("model.embed_tokens.weight", (VOCABULARY, hidden)), ("model.norm.weight", (hidden,))]
    tensors += [
        (f"model.layers.{n}.{name}.weight", shape) for n in range(2) for name, shape in shapes.items()
    ]
    known = tuple(TensorFact(name=name, dtype=dtype, shape=shape) for name, shape in tensors)
    return ModelFacts(
        format="safetensors",
        architecture=architecture,
        family=ARCHITECTURES[architecture].family,
        parameters=sum(t.elements for t in known),
        dtype=dtype,
        weight_bytes=sum(t.nbytes for t in known),
        hidden_size=hidden,
        num_blocks=2,
        vocab_size=VOCABULARY,
        max_positions=128,
        tied_embeddings=True,
        attention_heads=HEADS,
        key_value_heads=3,
        tensors=known,
    )


def faults(of: ModelFacts, *steps: Step) -> dict[str, str]:
    spec = CompressionSpec.model_validate({"steps": [step.model_dump() for step in steps]})
    return {fault.pointer: fault.detail for fault in check_spec(spec, of)}


@pytest.mark.parametrize(
    ("step", "width", "multiple", "left"),
    [
        (PruneHidden(), 4096, 32, 3072),
        # 9 heads and 16: multiples of 144.
        (PruneHidden(), 576, 9, 432),
        # 216 lies between two multiples of 48: the larger.
        (PruneHidden(), 288, 6, 240),
        (PruneHidden(round_to=8), 288, 6, 216),
        (PruneHidden(drop_ratio=0.01), 64, 1, 48),
        (PruneHidden(drop_ratio=0.99), 64, 1, 16),
        (PruneHidden(), 16, 1, None),
        (PruneHidden(), 144, 9, None),
        (PruneHidden(hidden_size=216), 288, 6, 216),
        (PruneHidden(hidden_size=217), 288, 6, None),
        (PruneHidden(hidden_size=217), 288, 1, 217),
        (PruneHidden(hidden_size=288), 288, 1, None),
    ],
)
def test_a_width_is_rounded_to_a_smaller_multiple_or_given(
    step: PruneHidden, width: int, multiple: int, left: int | None
) -> None:
    assert step.width_after(width, multiple) == left


def test_an_amount_is_given_once() -> None:
    with pytest.raises(ValueError, match="hidden_size or drop_ratio, not both"):
        PruneHidden(hidden_size=64, drop_ratio=0.5)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("model.embed_tokens.weight", 1),
        ("lm_head.weight", 1),
        ("model.norm.weight", 0),
        ("model.layers.0.input_layernorm.weight", 0),
        ("model.layers.0.self_attn.q_proj.weight", 1),
        ("model.layers.0.self_attn.q_proj.bias", None),
        ("model.layers.0.self_attn.o_proj.bias", 0),
        ("model.layers.0.self_attn.q_norm.weight", None),
        ("model.layers.0.block_sparse_moe.gate.weight", 1),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", 0),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", 1),
    ],
)
def test_the_hidden_width_is_found_in_a_tensor(name: str, axis: int | None) -> None:
    assert hidden_axis(name) == axis


@pytest.mark.parametrize(
    "architecture",
    ["Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM", "CohereForCausalLM", "StableLmForCausalLM", "GPT2LMHeadModel"],
)  # fmt: skip
def test_states_that_cannot_be_turned_are_refused_with_what_works(architecture: str) -> None:
    assert "prune.depth" in faults(facts(architecture), PruneHidden())["/steps/0/technique"]


@pytest.mark.parametrize("step", [PruneHidden(), PruneHeads()], ids=lambda step: step.technique)
def test_a_network_that_came_as_onnx_is_refused_with_what_works(step: Step) -> None:
    layer = TensorFact(name="0.weight", dtype="F32", shape=(10, 8))
    network = {
        "format": "onnx",
        "architecture": "ONNX",
        "family": Family.IMAGE_CLASSIFIER,
        "tensors": (layer,),
    }
    found = faults(facts().model_copy(update=network | {"attention_heads": None}), step)
    assert (
        "image_classifier" in found["/steps/0/technique"] or "prune.channels" in found["/steps/0/technique"]
    )


def test_what_leaves_nothing_smaller_is_refused_with_the_reason() -> None:
    assert not faults(facts(), PruneHidden())
    found = faults(facts(), PruneHidden(hidden_size=500))
    assert "that its 9 heads divide" in found["/steps/0/hidden_size"]
    assert "of 128 below the 576" in faults(facts(), PruneHidden(round_to=128))["/steps/0/round_to"]
    assert not faults(facts("MistralForCausalLM"), PruneHidden(hidden_size=500))
    assert "already compressed" in faults(facts(dtype="I8"), PruneHidden())["/steps/0/technique"]


def test_the_steps_after_it_are_checked_against_the_narrower_model() -> None:
    grouped = QuantizeWeights(group_size=64)
    assert not faults(facts(), grouped)
    assert "q_proj (432)" in faults(facts(), PruneHidden(), grouped)["/steps/1/group_size"]
    # Six heads divide 576, and not 459: three are left.
    plans = [
        plan_job(CompressionSpec(steps=(PruneHidden(hidden_size=459), PruneHeads(drop_ratio=ratio))), facts())
        for ratio in (0.01, 0.6)
    ]
    assert plans[0].output_bytes == plans[1].output_bytes
    assert (
        "below the 144" in faults(facts(), PruneHidden(hidden_size=144), PruneHidden())["/steps/1/round_to"]
    )


@pytest.mark.parametrize(
    "step", [PruneHidden(hidden_size=432), PruneHeads()], ids=lambda step: step.technique
)
def test_a_gguf_that_could_not_say_the_size_of_a_head_is_refused(step: Step) -> None:
    assert "size of a head" in faults(facts("Qwen2ForCausalLM"), step, QuantizeGguf())["/steps/1/technique"]
    assert not faults(facts("Qwen2ForCausalLM"), QuantizeGguf())
    assert not faults(facts("Qwen3ForCausalLM"), step, QuantizeGguf())


def test_heads_that_went_before_need_divide_no_more() -> None:
    fewer = PruneHeads(drop_ratio=0.3)
    assert "its 9 heads" in faults(facts(), PruneHidden(hidden_size=480))["/steps/0/hidden_size"]
    assert not faults(facts(), fewer, PruneHidden(hidden_size=480))


def test_a_plan_has_the_bytes_of_the_narrower_model() -> None:
    narrower = plan_job(CompressionSpec(steps=(PruneHidden(hidden_size=432),)), facts())
    as_built = plan_job(CompressionSpec(steps=(PruneMagnitude(),)), facts(hidden=432))
    assert narrower.output_bytes == as_built.output_bytes
    assert with_hidden_width(facts().tensors, 432) == facts(hidden=432).tensors


def test_a_plan_counts_the_moments_of_states() -> None:
    spec = CompressionSpec(steps=(PruneHidden(round_to=9),))
    peaks = [plan_job(spec, facts(hidden=hidden)).stages[2].peak_memory_bytes for hidden in (576, 4608)]
    assert peaks[1] - peaks[0] > 8 * 4 * 4608**2


@pytest.mark.parametrize("pruning", [PruneCalibrated(), PruneMagnitude()], ids=lambda step: step.technique)
def test_zeros_are_made_after_a_model_is_narrowed(pruning: PruneCalibrated | PruneMagnitude) -> None:
    assert CompressionSpec(steps=(PruneHidden(), pruning))
    with pytest.raises(ValueError, match=r"steps/1: prune\.hidden"):
        CompressionSpec(steps=(pruning, PruneHidden()))
