"""What became of every compressible layer of the original, over all steps: nothing may be left out in silence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from app.spec.architectures import block_index, with_block_index
from app.spec.facts import ModelFacts
from app.spec.prune_experts import expert_number, with_expert_number
from app.spec.report import Coverage, LayerOutcome, StepReport


def compose(facts: ModelFacts, steps: Sequence[StepReport]) -> Coverage:
    """Follow each layer of the original through the steps; compressed and untouched ones add up to all.

    Steps name the layers of the model they were given: after one that removes blocks, numbers mean others than before.
    """
    layers = {_plain(fact.name): fact.elements for fact in facts.compressible()}
    names = {name: name for name in layers}
    compressed: set[str] = set()
    reasons: dict[str, str] = {}
    for step in steps:
        outcomes = {_plain(outcome.name): outcome for outcome in step.layers}
        for current, original in names.items():
            outcome = outcomes.get(current)
            if outcome is not None and outcome.action != "untouched":
                compressed.add(original)
            elif outcome is not None and outcome.reason:
                reasons[original] = outcome.reason
        names = _after(names, outcomes)
    untouched = tuple(
        LayerOutcome(
            name=name,
            action="untouched",
            reason=reasons.get(name, "no step reported on it"),
            parameters=parameters,
        )
        for name, parameters in layers.items()
        if name not in compressed
    )
    return Coverage(
        total=len(layers),
        compressed=tuple(name for name in layers if name in compressed),
        untouched=untouched,
    )


def skipped(steps: Sequence[StepReport]) -> tuple[LayerOutcome, ...]:
    """Layers that a step which works on every layer left as they were, each once."""
    found = {
        outcome.name: outcome
        for step in steps
        for outcome in step.layers
        # Removing blocks, channels or heads leaves the other layers alone by its nature; training that gained nothing says so
        # in a warning of its own.
        if outcome.action == "untouched"
        and step.technique not in ("prune.width", "prune.heads", "distill.logits")
        and not any(o.action == "removed" for o in step.layers)
    }
    return tuple(found.values())


def _after(names: dict[str, str], outcomes: dict[str, LayerOutcome]) -> dict[str, str]:
    """The next step's names of the layers that are left: blocks and experts are numbered without gaps."""
    left = {
        current: original
        for current, original in names.items()
        if current not in outcomes or outcomes[current].action != "removed"
    }
    if len(left) == len(names):
        return names
    kept = sorted({index for name in left if (index := block_index(name + ".weight")) is not None})
    number = {old: new for new, old in enumerate(kept)}
    renumbered = {_renumbered(current, number): original for current, original in left.items()}
    return _experts_renumbered(renumbered)


def _experts_renumbered(names: dict[str, str]) -> dict[str, str]:
    """The same with the experts of each mixture numbered without gaps."""
    left: dict[str, set[int]] = defaultdict(set)
    for name in names:
        number = expert_number(name + ".weight")
        if number is not None:
            left[name.partition(".experts.")[0]].add(number)
    return {_expert_renumbered(name, left): original for name, original in names.items()}


def _expert_renumbered(name: str, left: dict[str, set[int]]) -> str:
    number = expert_number(name + ".weight")
    if number is None:
        return name
    rank = sorted(left[name.partition(".experts.")[0]]).index(number)
    return _plain(with_expert_number(name + ".weight", rank))


def _renumbered(name: str, number: dict[int, int]) -> str:
    index = block_index(name + ".weight")
    return name if index is None else _plain(with_block_index(name + ".weight", number[index]))


def _plain(name: str) -> str:
    """The module's name, whether a step gave that or its weight's."""
    return name.removesuffix(".weight")
