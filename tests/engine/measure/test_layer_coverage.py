from __future__ import annotations

from made_up import LINEARS, model_facts, quantized_step

from app.spec.report import LayerOutcome, StepReport
from workers.engine.measure.coverage import compose

FACTS = model_facts(blocks=3)


def _drop_block(number: int) -> StepReport:
    layers = tuple(
        LayerOutcome(
            name=fact.name,
            action="removed" if f".{number}." in fact.name else "untouched",
            reason=None if f".{number}." in fact.name else "kept block",
            parameters=fact.elements,
        )
        for fact in FACTS.tensors
    )
    return StepReport(technique="prune.depth", seconds=1, layers=layers)


def test_compressed_and_untouched_add_up_to_all() -> None:
    coverage = compose(FACTS, (_drop_block(1),))
    assert coverage.total == 6
    assert coverage.compressed == tuple(f"model.layers.1.{name}" for name in LINEARS)
    assert {o.reason for o in coverage.untouched} == {"kept block"}
    assert len(coverage.compressed) + len(coverage.untouched) == coverage.total


def test_a_later_step_is_followed_through_renumbered_blocks() -> None:
    # Block 0 is gone: what the second step calls block 1 was block 2, and only that is quantized.
    shorter = quantized_step(model_facts(blocks=2))
    outcomes = tuple(
        o if ".1." in o.name else o.model_copy(update={"action": "untouched", "reason": "ignored"})
        for o in shorter.layers
    )
    coverage = compose(FACTS, (_drop_block(0), shorter.model_copy(update={"layers": outcomes})))
    assert set(coverage.compressed) == {f"model.layers.{i}.{name}" for i in (0, 2) for name in LINEARS}
    assert {(o.name, o.reason) for o in coverage.untouched} == {
        (f"model.layers.1.{name}", "ignored") for name in LINEARS
    }


def test_a_layer_no_step_mentions_is_not_forgotten() -> None:
    step = quantized_step(FACTS)
    coverage = compose(FACTS, (step.model_copy(update={"layers": step.layers[1:]}),))
    (missing,) = coverage.untouched
    assert missing.reason == "no step reported on it"
