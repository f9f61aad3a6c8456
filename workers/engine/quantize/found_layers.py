"""Write a checkpoint from what was found of its blocks, what was there before, and a head that is rounded on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from app.spec.architectures import block_index
from app.spec.facts import TensorFact
from workers.engine.calibration.block_journal import BlockJournal
from workers.engine.checkpoint import Checkpoint, CheckpointWriter, Slab, map_slabs, row_slabs
from workers.engine.checkpoint.layout import TensorEntry
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.quantize.packed_layers import WeightError
from workers.engine.quantize.slab_rounding import round_slab
from workers.engine.technique import StepContext


def write_journal(
    checkpoint: Checkpoint,
    layers: Mapping[str, StoredLayer],
    journal: BlockJournal,
    context: StepContext,
    *,
    solving: float,
) -> dict[str, list[WeightError]]:
    """Write what a journal has of all blocks, see `write_found`; progress runs on from `solving` to 1."""
    return write_found(
        checkpoint,
        layers,
        {entry.name: entry for entry in journal.entries()},
        context,
        progress=lambda share: context.progress(solving + (1 - solving) * share, "writing"),
    )


def write_found(
    checkpoint: Checkpoint,
    layers: Mapping[str, StoredLayer],
    found: Mapping[str, TensorEntry],
    context: StepContext,
    *,
    progress: Callable[[float], None],
) -> dict[str, list[WeightError]]:
    """Put what the blocks became where their weights were, and copy everything else, slab by slab.

    `layers`: what is stored otherwise than before; `found`: tensors of those inside blocks, and others that changed.
    Layers outside the blocks are rounded to nearest. Returns what that lost, by the names of their weights.
    """
    heads = {name: layer for name, layer in layers.items() if block_index(name) is None}
    entries = _entries(checkpoint, layers, found)
    facts = [fact for name, entry in entries.items() for fact in _facts(entry, heads.get(name))]
    errors: dict[str, list[WeightError]] = {name: [] for name in heads}
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:
        for slab, error in map_slabs(
            replace(checkpoint, tensors=entries),
            [slab for name, entry in entries.items() for slab in _slabs(entry, heads.get(name))],
            _Work(heads, writer),
            threads=context.threads,
            progress=progress,
        ):
            if slab.entry.name in heads:
                errors[slab.entry.name].append(error)
    return errors


@dataclass(frozen=True)
class _Work:
    """Rounds slabs of heads and copies all others."""

    heads: Mapping[str, StoredLayer]
    writer: CheckpointWriter

    def __call__(self, slab: Slab, rows: Tensor) -> WeightError:
        layer = self.heads.get(slab.entry.name)
        if layer is not None:
            # Integers have one grid whatever the largest weight is.
            return round_slab(slab, rows, layer, layer.grid(0.0), "mse", self.writer)
        self.writer.write_rows(slab.entry.name, slab.start, rows)
        return WeightError()


def _entries(
    checkpoint: Checkpoint, layers: Mapping[str, StoredLayer], found: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Where each tensor is read from, by the name it will have; a head by the name it had."""
    entries: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        solved = name in layers and block_index(name) is not None
        parts = [fact.name for fact in layers[name].facts()] if solved else [name]
        entries |= {part: found.get(part, entry) for part in parts}
    # Scales of the cache stand for no tensor of the original.
    return entries | {name: entry for name, entry in found.items() if name not in entries}


def _facts(entry: TensorEntry, head: StoredLayer | None) -> list[TensorFact]:
    return [entry.fact] if head is None else head.facts()


def _slabs(entry: TensorEntry, head: StoredLayer | None) -> Iterator[Slab]:
    return row_slabs(entry, multiple=1 if head is None else head.row_multiple)
