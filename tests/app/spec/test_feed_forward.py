"""Narrower feed-forward parts: how wide they become, what is refused, and what a plan says of them."""

from __future__ import annotations

import pytest

from app.spec.architectures import ARCHITECTURES
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts, TensorFact
from app.spec.feed_forward import feed_forward_of, widths_of, with_width
from app.spec.plan import plan_job
from app.spec.prune import PruneCalibrated, PruneMagnitude, PruneWidth
from app.spec.quantize import QuantizeWeights

HIDDEN, WIDTH = 64, 256


def llama(dtype: str = "F32", width: int = WIDTH) -> ModelFacts:
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (width, HIDDEN), "mlp.up_proj": (width, HIDDEN),
        "mlp.down_proj": (HIDDEN, width),
    }  # fmt: skip
    tensors = tuple(
        TensorFact(name=f"model.layers.{block}.{name}.weight", dtype=dtype, shape=shape)
        for block in range(2)
        for name, shape in shapes.items()
    )
    return ModelFacts(
        format="safetensors",
        architecture="LlamaForCausalLM",
        family=ARCHITECTURES["LlamaForCausalLM"].family,
        parameters=sum(t.elements for t in tensors),
        dtype=dtype,
        weight_bytes=sum(t.nbytes for t in tensors),
        hidden_size=HIDDEN,
        num_blocks=2,
        vocab_size=320,
        max_positions=128,
        tensors=tensors,
    )


def faults(facts: ModelFacts, *steps: PruneWidth | QuantizeWeights) -> dict[str, str]:
    return {fault.pointer: fault.detail for fault in check_spec(CompressionSpec(steps=steps), facts)}


@pytest.mark.parametrize(
    ("width", "drop_ratio", "round_to", "left"),
    [
        (11_008, 0.25, 64, 8_256),
        (768, 0.25, 64, 576),
        # 96 lies between two multiples: the larger; not where nothing would go.
        (192, 0.5, 64, 128),
        (128, 0.25, 64, 64),
        (1000, 0.01, 64, 960),
        (1000, 0.99, 64, 64),
        (100, 0.3, 1, 70),
        (65, 0.25, 64, 64),
        (64, 0.25, 64, None),
        (48, 0.25, 64, None),
    ],
)
def test_a_width_is_rounded_to_a_smaller_multiple(
    width: int, drop_ratio: float, round_to: int, left: int | None
) -> None:
    assert PruneWidth(drop_ratio=drop_ratio, round_to=round_to).width_after(width) == left


def test_what_few_tokens_say_is_trusted_less_unless_a_damping_is_given() -> None:
    assert PruneWidth().damping_for(channels=768, tokens=3072) == 0.25
    assert PruneWidth().damping_for(channels=768, tokens=100) == 1.0
    assert PruneWidth(damping=0.01).damping_for(channels=768, tokens=100) == 0.01


def test_every_architecture_without_experts_says_where_its_channels_lie() -> None:
    without = {a.name for a in ARCHITECTURES.values() if feed_forward_of(a) is None and not a.takes_images}
    assert without == {a.name for a in ARCHITECTURES.values() if a.expert_layers is not None}


def test_a_fused_projection_loses_the_channels_of_both_halves() -> None:
    phi = ARCHITECTURES["Phi3ForCausalLM"]
    fused = TensorFact(name="model.layers.0.mlp.gate_up_proj.weight", dtype="F32", shape=(2 * WIDTH, HIDDEN))
    reader = TensorFact(name="model.layers.0.mlp.down_proj.weight", dtype="F32", shape=(HIDDEN, WIDTH))
    assert widths_of([fused, reader], phi) == {WIDTH}
    assert [t.shape for t in with_width([fused, reader], phi, 96)] == [(192, HIDDEN), (HIDDEN, 96)]


def test_outputs_of_attention_are_no_channels() -> None:
    bert = ARCHITECTURES["BertModel"]
    name = "encoder.layer.0.attention.output.dense.weight"
    attention = TensorFact(name=name, dtype="F32", shape=(HIDDEN, HIDDEN))
    assert widths_of([attention], bert) == set()
    assert with_width([attention], bert, 32) == (attention,)


def test_a_multiple_that_removes_nothing_is_refused_with_one_that_works() -> None:
    found = faults(llama(), PruneWidth(round_to=WIDTH))
    assert found.keys() == {"/steps/0/round_to"}
    assert "128 works" in found["/steps/0/round_to"]
    assert not faults(llama(), PruneWidth(round_to=128))


def test_a_quantized_model_is_not_narrowed() -> None:
    assert "already compressed" in faults(llama("I8"), PruneWidth())["/steps/0/technique"]


def test_the_steps_after_it_are_checked_against_the_narrower_layers() -> None:
    narrowing, quantizing = (
        PruneWidth(drop_ratio=0.25, round_to=32),
        QuantizeWeights(group_size=128, ignore=("*_attn*", "*.gate_proj", "*.up_proj")),
    )
    assert not faults(llama(), quantizing)
    assert "down_proj (192)" in faults(llama(), narrowing, quantizing)["/steps/1/group_size"]


def test_a_plan_has_the_bytes_of_the_narrower_model() -> None:
    narrower = plan_job(CompressionSpec(steps=(PruneWidth(drop_ratio=0.5),)), llama())
    as_built = plan_job(CompressionSpec(steps=(PruneMagnitude(),)), llama(width=WIDTH // 2))
    assert narrower.output_bytes == as_built.output_bytes


def test_a_plan_counts_the_statistics_and_their_inverse() -> None:
    spec = CompressionSpec(steps=(PruneWidth(),))
    peaks = [plan_job(spec, llama(width=width)).stages[2].peak_memory_bytes for width in (WIDTH, 4096)]
    assert peaks[1] - peaks[0] > 3 * 4 * 4096**2


@pytest.mark.parametrize("pruning", [PruneCalibrated(), PruneMagnitude()], ids=lambda step: step.technique)
def test_zeros_are_made_after_a_model_is_narrowed(pruning: PruneCalibrated | PruneMagnitude) -> None:
    assert CompressionSpec(steps=(PruneWidth(), pruning))
    with pytest.raises(ValueError, match=r"steps/1: prune\.width"):
        CompressionSpec(steps=(pruning, PruneWidth()))
