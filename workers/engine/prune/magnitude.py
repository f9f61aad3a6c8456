"""prune.magnitude: set the smallest weights of linear layers to zero (Han et al. 2015), one slab of rows at a time.

Unstructured, a first look finds the exact threshold of each layer, or one for all; a last pass writes. 2:4 needs no
first look: of each four neighbouring inputs the two smallest weights go. Memory does not grow with the model.
Leaves out: what the inputs say (Wanda, SparseGPT), gradual schedules, and training afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import UnsupportedForModel
from app.spec.architectures import Architecture, architecture_in
from app.spec.layouts import inputs_of
from app.spec.prune import PruneMagnitude
from app.spec.report import LayerOutcome
from workers.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Slab,
    copy_side_files,
    map_slabs,
    row_slabs,
)
from workers.engine.checkpoint.selection import Selection, non_finite, select_layers
from workers.engine.prune.threshold import Threshold, chunks, find_threshold, magnitude_keys, spread
from workers.engine.technique import StepContext, StepOutcome, implements

# The passes that look for thresholds, in share of the whole.
_SEARCH_SHARE = 0.5


@dataclass(frozen=True)
class SlabOutcome:
    """Counted on the rows as they were written."""

    zeros: int = 0
    removed: float = 0.0
    """Squared norm of what became zero."""
    weights: float = 0.0
    """Squared norm before."""


@implements(PruneMagnitude)
def prune_magnitude(step: PruneMagnitude, context: StepContext) -> StepOutcome:
    """Write `context.target` with the chosen layers pruned, everything else as it was."""
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore)
    architecture = architecture_in(checkpoint.config)
    if step.pattern == "2:4":
        _check_fours(selection, architecture)
        thresholds = {}
    else:
        thresholds = _thresholds(checkpoint, selection, step, context)
    is_turned = step.pattern == "2:4" and architecture.inputs_first
    begin = _SEARCH_SHARE if thresholds else 0.0
    outcomes: dict[str, list[SlabOutcome]] = {name: [] for name in selection.chosen}
    # Slabs hold whole fours also where inputs are rows.
    slabs = [slab for entry in checkpoint.tensors.values() for slab in row_slabs(entry, multiple=4)]
    with CheckpointWriter(context.target, checkpoint.facts(), context.max_shard_bytes) as writer:

        def work(slab: Slab, rows: Tensor) -> SlabOutcome:
            outcome = SlabOutcome()
            if slab.entry.name in selection.chosen:
                # 2:4 is along inputs, which are columns unless the architecture stores its weights (in, out).
                turned = rows.t().contiguous() if is_turned else rows
                outcome = _prune_rows(turned, thresholds.get(slab.entry.name), slab.entry.name)
                rows = turned.t().contiguous() if is_turned else turned
            writer.write_rows(slab.entry.name, slab.start, rows)
            return outcome

        progress = _progress(context, "pruning", begin, 1.0)
        for slab, outcome in map_slabs(checkpoint, slabs, work, threads=context.threads, progress=progress):
            if slab.entry.name in outcomes:
                outcomes[slab.entry.name].append(outcome)
    copy_side_files(context.source, context.target)
    return _outcome(selection, outcomes)


def _thresholds(
    checkpoint: Checkpoint, selection: Selection, step: PruneMagnitude, context: StepContext
) -> dict[str, Threshold]:
    """The threshold of each chosen layer; the same for all with scope `global`."""
    layers = list(selection.chosen.values())
    together = [layers] if step.scope == "global" else [[layer] for layer in layers]
    total = sum(layer.nbytes for layer in layers)
    thresholds: dict[str, Threshold] = {}
    done = 0
    for group in together:
        size = sum(layer.nbytes for layer in group)
        progress = _progress(
            context, "ranking weights", _SEARCH_SHARE * done / total, _SEARCH_SHARE * (done + size) / total
        )
        threshold = find_threshold(
            checkpoint, group, step.sparsity, threads=context.threads, progress=progress
        )
        thresholds |= {layer.name: threshold for layer in group}
        done += size
    return thresholds


def _prune_rows(rows: Tensor, threshold: Threshold | None, name: str) -> SlabOutcome:
    """Set weights of rows (n, columns) to zero in place: below the threshold, or without one, two of each four."""
    flat = rows.view(-1)
    mask = torch.cat(
        [
            _two_of_four(magnitude_keys(part)) if threshold is None else magnitude_keys(part) < threshold.key
            for part in chunks(rows)
        ]
    )
    if threshold is not None:
        ties = torch.cat([magnitude_keys(part) == threshold.key for part in chunks(rows)]).nonzero().view(-1)
        mask[ties[spread(len(ties), threshold.of_ties)]] = True
    before = removed = 0.0
    for part, cut in zip(chunks(rows), chunks(mask), strict=True):
        squares = part.float().square()
        before += squares.sum(dtype=torch.float64).item()
        removed += squares.masked_fill_(~cut, 0).sum(dtype=torch.float64).item()
    if not math.isfinite(before) and not torch.isfinite(flat).all():
        raise non_finite(name)
    flat.masked_fill_(mask, 0)
    return SlabOutcome(int((flat == 0).sum()), removed, before)


def _two_of_four(keys: Tensor) -> Tensor:
    """True for the two smallest of each four neighbours, the later of equals: (4n,) -> (4n,), bool."""
    four = keys.view(-1, 4).t().contiguous()
    larger = torch.zeros(four.shape, dtype=torch.int8)
    for i in range(4):
        for j in range(i + 1, 4):
            first_wins = four[i] >= four[j]
            larger[j] += first_wins
            larger[i] += ~first_wins
    return (larger >= 2).t().reshape(-1)


def _check_fours(selection: Selection, architecture: Architecture) -> None:
    wrong = [entry.name for entry in selection.chosen.values() if inputs_of(entry.shape, architecture) % 4]
    if wrong:
        raise UnsupportedForModel(
            f"2:4 needs inputs in fours; {len(wrong)} layers have another number, e.g. {wrong[0]}.",
            code="columns_not_in_fours",
            hint='Put these layers on the ignore list, or use pattern "unstructured".',
        )


def _progress(context: StepContext, what: str, begin: float, end: float) -> Callable[[float], None]:
    def progress(share: float) -> None:
        context.progress(begin + share * (end - begin), what)

    return progress


def _outcome(selection: Selection, outcomes: dict[str, list[SlabOutcome]]) -> StepOutcome:
    layers = tuple(
        LayerOutcome(
            name=name,
            action="pruned",
            parameters=entry.fact.elements,
            sparsity=sum(slab.zeros for slab in outcomes[name]) / entry.fact.elements,
            relative_error=_relative(outcomes[name]),
        )
        for name, entry in selection.chosen.items()
    )
    weights = sum(layer.parameters for layer in layers)
    zeros = sum(slab.zeros for slabs in outcomes.values() for slab in slabs)
    return StepOutcome(
        layers=(*layers, *selection.untouched),
        metrics={
            "pruned_weights": weights,
            "sparsity": zeros / weights,
            "relative_error": _relative([slab for slabs in outcomes.values() for slab in slabs]),
        },
        warnings=selection.warnings,
    )


def _relative(slabs: list[SlabOutcome]) -> float:
    weights = sum(slab.weights for slab in slabs)
    return math.sqrt(sum(slab.removed for slab in slabs) / weights) if weights else 0.0
