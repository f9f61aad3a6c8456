"""Attention maps: what each token looks at is taught, head by head.

Idea: the probabilities of attention say which tokens a block takes together, whatever the block then makes of them. A block
of a cut student is taught those of the block it was; other students' blocks are matched by depth.
Paper: Sun et al. 2020, "MobileBERT", section 3.3: KL of the teacher's and the student's distributions, mean over heads and
tokens. Where the numbers of heads differ, the distributions are averaged over heads first.
Probabilities exist only where attention is computed step by step (`eager`), tokens × tokens of them for each head.
Left out: models that hand their probabilities over only when the whole model is asked for them (MPNet, DeBERTa).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.distill.blocks import blocks_of

Maps = dict[int, Tensor]

# What the part of a block that computes attention is called, by its last name.
_NAMES = frozenset({"self_attn", "attn", "attention", "self"})
_LEAST = 1e-9
_MAP_DIMENSIONS = 4


class AttentionMaps(nn.Module):
    """Compares the attention of student and teacher; it has no parameters."""

    def __init__(self, student: Any, teacher: Any, taught_by: Sequence[int]) -> None:
        super().__init__()
        self._taught_by = taught_by
        # In a tuple, for modules of ours would count among the parameters.
        self._blocks = tuple(blocks_of(student)), tuple(blocks_of(teacher))

    @contextmanager
    def recorded(self) -> Iterator[tuple[Maps, Maps]]:
        """Collect the probabilities in student and teacher while both run: (texts, heads, tokens, tokens) by block."""
        maps: tuple[Maps, Maps] = ({}, {})
        wanted = range(len(self._taught_by)), set(self._taught_by)
        handles = [
            module.register_forward_hook(partial(_record, into, index))
            for blocks, into, indices in zip(self._blocks, maps, wanted, strict=True)
            for index in indices
            for name, module in blocks[index].named_modules()
            if name.rpartition(".")[2] in _NAMES
        ]
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, maps: tuple[Maps, Maps], mask: Tensor) -> Tensor:
        """Mean divergence over the student's blocks: mask (texts, tokens), 1 on real tokens -> ()."""
        student, teacher = maps
        divergences = [
            map_divergence(student[index], teacher[taught], mask)
            for index, taught in enumerate(self._taught_by)
        ]
        return torch.stack(divergences).mean()


def map_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of what tokens look at, mean over heads and real tokens.

    (texts, heads, tokens, tokens) twice, (texts, tokens) -> (). Averaged over heads first where their numbers differ.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (maps.mean(1, keepdim=True) for maps in (student, teacher))
    # Where neither looks, as at padding and at what is to come, both logarithms are the same.
    log_student, log_teacher = (maps.clamp(min=_LEAST).log() for maps in (student, teacher))
    divergence = (teacher * (log_teacher - log_student)).sum(-1).mean(1)
    return divergence[mask.bool()].mean()


def _record(into: Maps, index: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
    if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
        weights = output[1]
        if isinstance(weights, Tensor) and weights.dim() == _MAP_DIMENSIONS:
            into[index] = weights
