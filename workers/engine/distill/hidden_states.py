"""Hidden states: what leaves a student's blocks is taught to be what leaves the teacher's blocks they stand for.

Papers: Romero et al. 2015, "FitNets" (hints, with a learned projection where widths differ); Jiao et al. 2020,
"TinyBERT". A block of a cut student stands for itself and for those that went after it, so that the next one meets
what it always met. The distance is relative to the size of the teacher's state, token by token: a few tokens have
states a hundred times as large as all others (Sun et al. 2024, "Massive Activations"), and would be all that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.distill.blocks import blocks_of

States = dict[int, Tensor]

# Elements of a matrix that tell whose it is: those of two trained at random have a cosine of 0 ± 0.03.
_COMPARED = 1024
_SAME = 0.5


def stands_for(kept: Sequence[int], blocks: int) -> list[int]:
    """For each block of a student that kept these of a teacher's blocks, the one whose output it is taught."""
    return [following - 1 for following in (*kept[1:], blocks)]


def evenly_matched(student_blocks: int, teacher_blocks: int) -> list[int]:
    """The same for a student of another origin: as deep into the teacher as into the student."""
    return [-(-(index + 1) * teacher_blocks // student_blocks) - 1 for index in range(student_blocks)]


def kept_blocks(student: Any, teacher: Any) -> list[int] | None:
    """Which of the teacher's blocks those of a student are, by the directions of their weights; None where they are others.

    Pruned weights still point where they did, and layers that were made narrower are left out of account.
    """
    theirs = [_weights(block) for block in blocks_of(teacher)]
    kept: list[int] = []
    for block in blocks_of(student):
        ours, first = _weights(block), kept[-1] + 1 if kept else 0
        likeness = {index: _likeness(ours, theirs[index]) for index in range(first, len(theirs))}
        found = max(likeness, key=likeness.__getitem__, default=None)
        if found is None or likeness[found] < _SAME:
            return None
        kept.append(found)
    return kept


class HiddenStates(nn.Module):
    """Compares student and teacher; its parameters are the projections, if any."""

    def __init__(
        self, student: Any, teacher: Any, widths: tuple[int, int], stands_for: Sequence[int]
    ) -> None:
        super().__init__()
        self._stands_for = stands_for
        # In a tuple, for modules of ours would count among the parameters.
        self._blocks = tuple(blocks_of(student)), tuple(blocks_of(teacher))
        self.projections = nn.ModuleList(
            nn.Linear(*widths, bias=False) if widths[0] != widths[1] else nn.Identity() for _ in stands_for
        )

    @contextmanager
    def recorded(self) -> Iterator[tuple[States, States]]:
        """Collect what leaves the blocks of student and teacher while both run, by block: (texts, tokens, width) each."""
        states: tuple[States, States] = ({}, {})
        wanted = range(len(self._stands_for)), set(self._stands_for)
        handles = [
            blocks[index].register_forward_hook(partial(_record, into, index))
            for blocks, into, indices in zip(self._blocks, states, wanted, strict=True)
            for index in indices
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, states: tuple[States, States], mask: Tensor) -> Tensor:
        """Mean over blocks of the relative distance of the real tokens' states: mask (texts, tokens) -> ()."""
        student, teacher = states
        real = mask.bool()
        distances = [
            relative_distance(project(student[index][real].float()), teacher[taught][real].float())
            for index, (project, taught) in enumerate(zip(self.projections, self._stands_for, strict=True))
        ]
        return torch.stack(distances).mean()


def relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖², mean over tokens: two (tokens, width) -> ()."""
    squared = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
    return squared.mean()


def _record(into: States, index: int, _block: nn.Module, _arguments: Any, output: Any) -> None:
    into[index] = output[0] if isinstance(output, tuple) else output


def _weights(block: nn.Module) -> dict[tuple[str, torch.Size], Tensor]:
    """The beginnings of a block's matrices, by name and shape."""
    return {
        (name, weight.shape): weight.detach().flatten()[:_COMPARED].float()
        for name, weight in block.named_parameters()
        if weight.dim() > 1
    }


def _likeness(ours: dict[Any, Tensor], theirs: dict[Any, Tensor]) -> float:
    common = ours.keys() & theirs.keys()
    cosines = [nn.functional.cosine_similarity(ours[key], theirs[key], dim=0) for key in common]
    return float(torch.stack(cosines).mean()) if cosines else 0.0
