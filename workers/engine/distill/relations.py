"""Relations: which tokens of a text are alike to the last block, by their queries, by their keys and by their values.

Idea: for each of the three, the scaled products between all tokens of a text, after a softmax, are a distribution for
each token that does not depend on how wide the model is, nor on how many blocks came before.
Paper: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation", section 3. Vectors are cut into
relation heads whatever heads the models have.
Left out: a teacher's block other than the last, which the paper prefers for teachers of 24 blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import UnsupportedForModel
from app.spec.attention import projections_among
from workers.engine.distill.blocks import blocks_of

_HEADS = 16


class Relations(nn.Module):
    """Compares the last blocks of student and teacher; it has no parameters."""

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__()
        # In tuples, for modules of ours would count among the parameters.
        self._layers = tuple(_projections(model) for model in (student, teacher))

    @contextmanager
    def recorded(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Collect queries, keys and values of student and teacher while both run: (texts, tokens, width) each."""
        outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        handles = [
            layer.register_forward_hook(partial(_append, into))
            for layers, into in zip(self._layers, outputs, strict=True)
            for layer in layers
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, recorded: tuple[list[Tensor], list[Tensor]], mask: Tensor) -> Tensor:
        """Mean of the three divergences: mask (texts, tokens), 1 on real tokens -> ()."""
        divergences = [relation_divergence(*pair, mask) for pair in zip(*recorded, strict=True)]
        return torch.stack(divergences).mean()


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of tokens' relations, mean over heads and real tokens: two (texts, tokens, width) -> ().

    The widths may differ.
    """
    heads = math.gcd(student.shape[-1], teacher.shape[-1], _HEADS)
    log_student, log_teacher = (_log_relations(x.float(), mask, heads) for x in (student, teacher))
    # Columns of padding are −∞ in both.
    difference = (log_teacher - log_student).masked_fill(mask[:, None, None, :] == 0, 0.0)
    divergence = (log_teacher.exp() * difference).sum(-1).mean(1)
    return divergence[mask.bool()].mean()


def _log_relations(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    """(texts, tokens, width) -> log-probabilities (texts, heads, tokens, tokens)."""
    texts, tokens, _ = vectors.shape
    apart = vectors.view(texts, tokens, heads, -1).transpose(1, 2)
    products = apart @ apart.transpose(2, 3) / math.sqrt(apart.shape[-1])
    return products.masked_fill(mask[:, None, None, :] == 0, -math.inf).log_softmax(-1)


def _projections(model: Any) -> tuple[nn.Module, ...]:
    layers = dict(blocks_of(model)[-1].named_modules())
    names = projections_among(layers)
    if names is None:
        raise UnsupportedForModel(
            "Queries, keys and values come out of one layer, whose parts relations are not taken from.",
            hint="Set relation_weight to 0; hidden_weight works for every model.",
        )
    last_parts = {name.rpartition(".")[2]: layer for name, layer in layers.items()}
    return tuple(last_parts[name] for name in names)


def _append(into: list[Tensor], _layer: nn.Module, _arguments: Any, output: Tensor) -> None:
    into.append(output)
