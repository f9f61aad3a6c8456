"""What a student is taught, by kind of model: next-token distributions, classes, or embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.base import Family
from app.spec.facts import ModelFacts
from app.spec.text_training import TextTraining
from workers.engine.distill.losses import (
    Blend,
    Head,
    Teacher,
    TeacherStates,
    Unasked,
    direction_loss,
    similarity_loss,
    soft_loss,
    token_loss,
)
from workers.engine.distill.low_rank import LowRank
from workers.engine.distill.on_grid import OnGrid
from workers.engine.distill.teacher_cache import TeacherCache
from workers.engine.distill.texts import Batch

Tick = Callable[[], None]

# Cosines lie between −1 and 1: 20 is what sentence-transformers trains with.
_SHARPNESS = 20.0
# Each text needs two others: which of them is it more like?
_COMPARABLE_TEXTS = 3


class Matching(Protocol):
    """Compares what happens inside of student and teacher."""

    def recorded(self) -> AbstractContextManager[Any]:
        """Collect what is compared while both run."""

    def loss(self, recorded: Any, mask: Tensor) -> Tensor:
        """How far apart they are: mask (texts, tokens), 1 on real tokens -> ()."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is learned for the comparison alone."""


@dataclass(frozen=True)
class Classroom:
    """Teacher, student, and how they compute."""

    student: Any
    teacher: Any
    """None where what it says was written down, or does not count."""
    spec: TextTraining
    held_out: tuple[Batch, ...]
    device: str
    dtype: torch.dtype
    """Of matrix products; the student's own weights are fp32."""
    cache: TeacherCache | None = None
    adapters: LowRank | None = None
    """What is trained in place of the student's own weights."""
    grid: OnGrid | None = None
    """What rounds the student's weights while it computes."""
    matches: tuple[tuple[float, Matching], ...] = ()
    """What inside of the two is compared beside their outputs, and by which weight."""

    def autocast(self) -> torch.autocast:
        """Run the student in `dtype`."""
        return torch.autocast(
            self.device.split(":")[0], dtype=self.dtype, enabled=self.dtype != torch.float32
        )


class _Objective:
    """What all kinds share: the teacher is asked about held-out text once."""

    unit = "tokens"

    def __init__(self, room: Classroom) -> None:
        self.room = room
        self._held_out: list[tuple[Batch, Any]] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the student or its adapters, and projections."""
        parameters = dict((self.room.adapters or self.room.student).named_parameters())
        for _, matching in self.room.matches:
            parameters |= matching.named_parameters()
        return parameters

    def statistics(self) -> dict[str, Tensor]:
        """None: these models have no batch norms."""
        return {}

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch: of the outputs, and by their weights of what is compared inside."""
        batch, matches = batch.to(self.room.device), self.room.matches
        with ExitStack() as stack:
            recorded = [stack.enter_context(matching.recorded()) for _, matching in matches]
            loss = self._loss(batch, self._taught(batch))
        for (weight, matching), pair in zip(matches, recorded, strict=True):
            loss = loss + weight * matching.loss(pair, batch.mask)
        return loss

    @torch.no_grad()
    def held_out_loss(self, tick: Tick) -> float:
        """Mean loss of the outputs over the held-out batches, weighed by real tokens; calls `tick` after each batch."""
        total, weight = 0.0, 0
        for number, unplaced in enumerate(self.room.held_out):
            if number == len(self._held_out):
                batch = unplaced.to(self.room.device)
                self._held_out.append((batch, self._taught(batch)))
            batch, taught = self._held_out[number]
            tokens = int(batch.mask.sum())
            total += tokens * float(self._loss(batch, taught))
            weight += tokens
            tick()
        return total / weight

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Any:
        return self._outputs(self.room.teacher, batch)

    def _outputs(self, model: Any, batch: Batch) -> Tensor:
        raise NotImplementedError

    def _loss(self, batch: Batch, taught: Any) -> Tensor:
        raise NotImplementedError


class NextToken(_Objective):
    """A language model is taught the teacher's distribution of the next token, and the token itself."""

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Teacher:
        if self.room.cache is not None:
            return self.room.cache.read(batch.numbers, self.room.device)
        if self.room.teacher is None:
            return Unasked()
        return states_of(self.room.teacher, batch)

    def _loss(self, batch: Batch, taught: Teacher) -> Tensor:
        with self.room.autocast():
            states = states_of(self.room.student, batch)
        blend = Blend(self.room.spec.temperature, self.room.spec.hard_label_weight)
        labels = batch.ids[:, 1:].reshape(-1)
        return token_loss(states.hidden.to(self.room.dtype), states.head, taught, labels, blend)


class Classes(_Objective):
    """A classifier is taught the teacher's distribution over its classes, and the labels where the texts have some."""

    def _outputs(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return logits

    def _loss(self, batch: Batch, taught: Tensor) -> Tensor:
        with self.room.autocast():
            logits = self._outputs(self.room.student, batch)
        soft = soft_loss(logits, taught, temperature=self.room.spec.temperature)
        if batch.labels is None:
            return soft
        weight = self.room.spec.hard_label_weight
        return (1 - weight) * soft + weight * functional.cross_entropy(logits.float(), batch.labels)


class Embeddings(_Objective):
    """An encoder is taught the teacher's embeddings, or which texts are alike where its own have another width.

    Measured on MiniLM cut from 6 to 4 blocks (60 steps of 16 texts; rank correlation with the teacher's similarities
    on other text .825 before): embeddings alone .899, both with the embeddings' loss 20-fold .896, similarities .856.
    """

    def __init__(self, room: Classroom, *, first_token: bool) -> None:
        super().__init__(room)
        self._first_token = first_token
        self._same_width = width_of(room.student) == width_of(room.teacher)
        if not self._same_width and room.spec.batch_size < _COMPARABLE_TEXTS:
            raise InvalidRequest(
                f"A student of another width learns which of the texts in a batch are more alike, and {room.spec.batch_size}"
                " are too few to compare.",
                code="batch_too_small",
                hint=f"Ask for a batch_size of at least {_COMPARABLE_TEXTS}; 16 or more teaches better.",
            )

    def _outputs(self, model: Any, batch: Batch) -> Tensor:
        hidden: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state.float()
        if self._first_token:
            return hidden[:, 0]
        mask = batch.mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def _loss(self, batch: Batch, taught: Tensor) -> Tensor:
        with self.room.autocast():
            embeddings = self._outputs(self.room.student, batch)
        if self._same_width:
            return direction_loss(embeddings, taught)
        return similarity_loss(
            embeddings, taught, sharpness=_SHARPNESS, temperature=self.room.spec.temperature
        )


def objective_for(room: Classroom, facts: ModelFacts, original: Path) -> _Objective:
    """What a model of this kind is taught. Raises UnsupportedForModel when its outputs are not the teacher's."""
    if facts.family is Family.CAUSAL_LM:
        counts = [
            model.get_output_embeddings().weight.shape[0]
            for model in (room.student, room.teacher)
            if model is not None
        ]
        _check_equal(
            "rows in their output layers", [*counts, room.cache.vocabulary] if room.cache else counts
        )
        return NextToken(room)
    if facts.architecture.endswith("ForSequenceClassification"):
        _check_equal("classes", [model.config.num_labels for model in (room.student, room.teacher)])
        return Classes(room)
    return Embeddings(room, first_token=pools_first_token(original))


def _check_equal(what: str, counts: list[int]) -> None:
    if len(set(counts)) > 1:
        raise UnsupportedForModel(
            f"The student has {counts[0]} {what}, the teacher {counts[1]}.",
            hint="Choose a student whose outputs mean the same as the teacher's.",
        )


def states_of(model: Any, batch: Batch) -> TeacherStates:
    """The last hidden states of all tokens that have a next one, and the head that reads them."""
    hidden: Tensor = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return TeacherStates(hidden[:, :-1].reshape(-1, hidden.shape[-1]), head_of(model))


def head_of(model: Any) -> Head:
    """The output layer of a language model: Gemma 2 caps its logits, Cohere multiplies and Granite divides them."""
    config = model.config
    return Head(
        model.get_output_embeddings().weight,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
    )


def width_of(model: Any) -> int:
    """Width of a model's hidden states."""
    return int(model.config.hidden_size)


def pools_first_token(directory: Path) -> bool:
    """Whether sentence-transformers' pooling of this encoder takes the first token; without a word of it, the mean."""
    file = directory / "1_Pooling" / "config.json"
    return file.is_file() and bool(json.loads(file.read_text()).get("pooling_mode_cls_token", False))
