"""Fewer heads: how many are left, what is refused, and what a plan says of them."""

from __future__ import annotations

import pytest

from app.spec.architectures import ARCHITECTURES
from app.spec.attention_heads import HeadCounts, counts_in, has_removable_heads, possible_groups
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts, TensorFact
from app.spec.plan import plan_job
from app.spec.prune import PruneCalibrated, PruneDepth, PruneHeads, PruneWidth

HIDDEN, HEADS, GROUPS, SIZE = 576, 9, 3, 64


def facts(architecture: str = "LlamaForCausalLM", groups: int = GROUPS, dtype: str = "F32") -> ModelFacts:
    """SmolLM2's attention and feed-forward part in two blocks, with as many heads a group as it has."""
    queries = groups * (HEADS // GROUPS) * SIZE
    shapes = {
        "self_attn.q_proj": (queries, HIDDEN), "self_attn.k_proj": (groups * SIZE, HIDDEN),
        "self_attn.v_proj": (groups * SIZE, HIDDEN), "self_attn.o_proj": (HIDDEN, queries), "mlp.down_proj": (HIDDEN, 1536),
    }  # fmt: skip
    tensors = tuple(
        TensorFact(name=f"model.layers.{block}.{name}.weight", dtype=dtype, shape=shape)
        for block in range(2)
        for name, shape in shapes.items()
    )
    return ModelFacts(
        format="safetensors", architecture=architecture, family=ARCHITECTURES[architecture].family,
        parameters=sum(t.elements for t in tensors), dtype=dtype, weight_bytes=sum(t.nbytes for t in tensors),
        hidden_size=HIDDEN, num_blocks=2, vocab_size=320, max_positions=128, attention_heads=groups * (HEADS // GROUPS),
        key_value_heads=groups, tensors=tensors,
    )  # fmt: skip


def faults(of: ModelFacts, *steps: PruneHeads | PruneDepth) -> dict[str, str]:
    return {fault.pointer: fault.detail for fault in check_spec(CompressionSpec(steps=steps), of)}


@pytest.mark.parametrize(
    ("groups", "drop_ratio", "left"),
    [(3, 0.25, 2), (3, 0.9, 1), (8, 0.25, 6), (8, 0.5, 4), (8, 0.01, 7), (8, 0.3125, 6), (1, 0.5, None)],
)
def test_the_nearest_number_stays_and_something_goes(
    groups: int, drop_ratio: float, left: int | None
) -> None:
    assert PruneHeads(drop_ratio=drop_ratio).groups_after(groups, range(1, groups)) == left


def test_llamas_configuration_wants_a_divisor_of_the_hidden_width_and_others_do_not() -> None:
    counts = HeadCounts(groups=8, per_group=1, size=36)
    assert possible_groups(ARCHITECTURES["LlamaForCausalLM"], counts, 8, 288) == [1, 2, 3, 4, 6]
    assert possible_groups(ARCHITECTURES["Qwen2ForCausalLM"], counts, 8, 288) == [1, 2, 3, 4, 5, 6, 7]


def test_heads_are_counted_from_shapes_and_configuration() -> None:
    assert counts_in(facts()) == HeadCounts(groups=3, per_group=3, size=64)
    assert counts_in(facts().model_copy(update={"attention_heads": None})) is None


def test_plans_count_the_bytes_that_are_left() -> None:
    whole, step = facts(), PruneHeads(drop_ratio=0.3)
    planned = plan_job(CompressionSpec(steps=(step,)), whole)
    assert planned.output_bytes == _bytes(facts(groups=2))
    twice = plan_job(CompressionSpec(steps=(step, step)), whole)
    assert twice.output_bytes == _bytes(facts(groups=1))


def _bytes(of: ModelFacts) -> int:
    """Of a model whose weights keep their shapes."""
    return plan_job(CompressionSpec(steps=(PruneCalibrated(),)), of).output_bytes


def test_what_cannot_be_written_is_refused_when_it_is_submitted() -> None:
    assert not faults(facts(), PruneHeads())
    assert "no smaller number" in faults(facts(groups=1), PruneHeads())["/steps/0/technique"]
    assert (
        "no smaller number" in faults(facts(), PruneHeads(drop_ratio=0.6), PruneHeads())["/steps/1/technique"]
    )
    assert "cannot say" in faults(facts("Olmo2ForCausalLM"), PruneHeads())["/steps/0/technique"]
    assert "already compressed" in faults(facts(dtype="I8"), PruneHeads())["/steps/0/technique"]
    # An older upload, of which it is not known how many there are.
    assert not faults(facts(groups=1).model_copy(update={"attention_heads": None}), PruneHeads())


def test_it_stands_before_steps_that_leave_zeros() -> None:
    assert CompressionSpec(steps=(PruneHeads(), PruneWidth(), PruneCalibrated()))
    with pytest.raises(ValueError, match=r"prune\.heads would fill the zeros"):
        CompressionSpec(steps=(PruneCalibrated(), PruneHeads()))


def test_every_architecture_is_known_to_have_them_or_not() -> None:
    texts = [a for a in ARCHITECTURES.values() if not a.takes_images]
    refused = {a.model_type for a in texts if not has_removable_heads(a)}
    assert refused == {
        "cohere", "olmo2", "stablelm", "gpt2", "gpt_neox", "opt", "bert", "roberta", "xlm-roberta", "distilbert", "mpnet",
        "electra", "modernbert", "deberta-v2",
    }  # fmt: skip
