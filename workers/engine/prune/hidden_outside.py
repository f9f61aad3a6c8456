"""Embedding, last norm and head of a model whose states are narrowed, and writing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.spec.architectures import architecture_in, block_index
from app.spec.prune_hidden import EMBEDDING, FINAL_NORM, HEAD, adds_one_to_gains, with_hidden_width
from workers.engine.calibration.input_moments import InputSite
from workers.engine.checkpoint import Checkpoint, CheckpointWriter, Slab, TensorEntry, map_slabs, row_slabs
from workers.engine.prune.hidden_directions import Directions
from workers.engine.prune.hidden_fit import HeadSums
from workers.engine.prune.least_squares import damped_solution
from workers.engine.technique import StepContext


@dataclass(frozen=True)
class Outside:
    """What lies outside the blocks, as it was."""

    checkpoint: Checkpoint
    is_tied: bool
    """Whether the head shares the embedding's matrix, whatever the file has."""

    def name_of(self, module: str) -> str | None:
        """The stored name of a module's weight; None where the file has none."""
        names = (name for name in self.checkpoint.tensors if block_index(name) is None)
        return next((n for n in names if n.removesuffix(".weight").rpartition(".")[2] == module), None)

    def gains(self) -> Tensor:
        """γ of the last norm: (hidden,)."""
        return self.checkpoint.read(self._required(FINAL_NORM)).float() + self._one

    def narrow_rows(self, directions: Directions) -> Tensor:
        """What the rows of the embedding are multiplied by: (hidden, width)."""
        return self._factor(directions) * directions.basis

    def _factor(self, directions: Directions) -> float:
        # Gemma multiplies the rows by the root of the width itself.
        return 1.0 if self._one else directions.scale

    def narrowed(
        self, directions: Directions, sums: HeadSums | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By stored names, what rows are multiplied by, (hidden, width), and the last norm's weight, (width,).

        Without sums nothing is fitted.
        """
        rows = self.narrow_rows(directions)
        maps = {self._required(EMBEDDING): rows}
        if self.is_tied:
            gains = self.tied_gains(directions, sums)
        else:
            gains = torch.ones(rows.shape[1])
            reading = directions.reading
            if sums is not None:
                reading = reading + damped_solution(sums.gram, sums.cross, sums.tokens).T
            rows = self.gains()[:, None] * reading
        head = self.name_of(HEAD)
        if head is not None:
            maps[head] = rows
        return maps, {self._required(FINAL_NORM): gains - self._one}

    def tied_gains(self, directions: Directions, sums: HeadSums | None) -> Tensor:
        """λ of the last norm (width,), with which logits E' diag(λ) z come nearest to E diag(γ) x, E' = E · `narrow_rows`.

        All logits count alike: with S = Σ e eᵀ over E's rows, λ solves (E'ᵀE' ∘ Σ z zᵀ) λ = diag(E'ᵀE diag(γ) Σ x zᵀ).
        """
        gains, rows = self.gains(), self.narrow_rows(directions)
        own = (directions.basis.square() * gains[:, None]).sum(0) / (
            directions.scale * self._factor(directions)
        )
        if sums is None:
            return own
        seen = directions.reading @ sums.gram + sums.cross.T
        turned = self._moment_of_rows() @ rows
        system = (rows.T @ turned) * sums.gram
        missing = (turned * (gains[:, None] * seen)).sum(0) - system @ own
        return own + damped_solution(system, missing[:, None], sums.tokens)[:, 0]

    def _moment_of_rows(self) -> Tensor:
        """E[e eᵀ] of the embedding's rows: (hidden, hidden)."""
        entry, site = self.checkpoint.tensors[self._required(EMBEDDING)], InputSite([EMBEDDING])
        for slab in row_slabs(entry):
            site.add(self.checkpoint.read_rows(entry.name, slab.start, slab.stop).float())
        return site.second_moment()

    @property
    def _one(self) -> float:
        return 1.0 if adds_one_to_gains(architecture_in(self.checkpoint.config)) else 0.0

    def _required(self, module: str) -> str:
        name = self.name_of(module)
        if name is None:
            raise ValueError(f"the weights have no {module}")
        return name


def write_narrow(
    checkpoint: Checkpoint,
    blocks: Mapping[str, TensorEntry],
    outside: tuple[dict[str, Tensor], dict[str, Tensor]],
    context: StepContext,
    *,
    progress: Callable[[float], None],
) -> None:
    """Write what the blocks became, and what lies outside them, slab by slab; `outside` as `Outside.narrowed` gives it."""
    maps, norms = outside
    width = next(iter(maps.values())).shape[1]
    entries = {name: blocks.get(name, entry) for name, entry in checkpoint.tensors.items()}
    facts = with_hidden_width(checkpoint.facts(), width)
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:

        def work(slab: Slab, rows: Tensor) -> None:
            by = maps.get(slab.entry.name)
            writer.write_rows(
                slab.entry.name, slab.start, rows if by is None else (rows.float() @ by).to(rows.dtype)
            )

        for name, weight in norms.items():
            writer.write(name, weight.to(checkpoint.tensors[name].dtype))
        slabs = [slab for name, entry in entries.items() if name not in norms for slab in row_slabs(entry)]
        for _ in map_slabs(
            replace(checkpoint, tensors=entries), slabs, work, threads=context.threads, progress=progress
        ):
            pass
