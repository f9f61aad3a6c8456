"""Distillation: a student learns to give its teacher's outputs.

Idea: the teacher's distribution over all answers says more than the one right answer; a student trained on it, softened
by a temperature so that small probabilities count, needs little text to recover what a cut took away.
Paper: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network". An encoder without a head has no such
distribution: it is taught the embeddings themselves, by 1 − cosine, texts pooled as the model's own 1_Pooling says, by
the mean without one. Where student and teacher differ in width, rows of the matrix of similarities within a batch take
the place of logits (Park et al. 2019, "Relational Knowledge Distillation").
Beside the outputs, hidden states (`hidden_states`), relations (`relations`) and attention (`attention_maps`) can be taught, and a student
be cut from the teacher (`cut`). Left out: dropout (off throughout).
"""

from __future__ import annotations

from pathlib import Path

import torch

from app.errors import InvalidRequest
from app.spec.architectures import block_index, is_compressible, with_block_index
from app.spec.distill import DistillLogits
from app.spec.report import LayerOutcome
from workers.engine.architectures.block_removal import number_of_blocks
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.block_journal import open_journal
from workers.engine.checkpoint import Checkpoint
from workers.engine.distill.objectives import objective_for
from workers.engine.distill.preparation import (
    PREPARING,
    classroom,
    journal_key,
    student_directory,
    training_text,
)
from workers.engine.distill.record import Training
from workers.engine.distill.snapshots import Snapshots
from workers.engine.distill.students import check_fit, write_student, zeros_to_hold
from workers.engine.distill.training import train
from workers.engine.technique import StepContext, StepOutcome, implements

_TRAINING = 0.95


@implements(DistillLogits)
def distill_logits(spec: DistillLogits, context: StepContext) -> StepOutcome:
    """Train a student on the training text by the original's outputs and write its best state.

    Raises UnsupportedForModel when the student cannot be compared with the teacher, InvalidRequest when the text is
    too short or low-rank adapters would fill pruned weights.
    """
    torch.manual_seed(context.seed)
    text = training_text(spec, context)
    with (
        open_journal(context.journal, context.target.parent, journal_key(spec, context)) as journal,
        student_directory(spec, context, text, journal.directory) as (directory, dropped),
    ):
        tokenizers = [load_tokenizer(place) for place in (directory, context.original)]
        check_fit(directory, context.original, *tokenizers)
        room = classroom(spec, context, directory, text, journal.directory)
        zeros = zeros_to_hold(room.student)
        if zeros and room.adapters is not None:
            raise InvalidRequest(
                f"{len(zeros)} layers of the student are pruned, and low-rank adapters would fill their zeros.",
                code="adapters_fill_zeros",
                hint="Leave lora_rank out: training of all weights holds the zeros.",
            )
        training = train(
            objective_for(room, context.facts, context.original),
            text.batches(),
            spec,
            batches_a_step=spec.gradient_accumulation,
            zeros=zeros,
            snapshots=Snapshots(journal.directory),
            progress=lambda share, message: context.progress(
                PREPARING + (_TRAINING - PREPARING) * share, message
            ),
            is_stopped=context.stop_training,
        )
        if room.adapters is not None:
            room.adapters.merge()
        if room.grid is not None:
            room.grid.settle()
        context.progress(_TRAINING, "writing the student")
        outcomes = write_student(
            room.student,
            directory,
            context.target,
            max_shard_bytes=context.max_shard_bytes,
            is_trained=training.improved,
        )
    context.progress(1.0, "done")
    return StepOutcome(
        layers=_all_layers(context.original, outcomes, dropped),
        metrics=training.metrics()
        | {
            "blocks_removed": " ".join(map(str, dropped)),
            "cache_bytes_per_token": room.cache.bytes_per_token if room.cache else None,
        },
        curves=training.curves(),
        warnings=_warnings(training),
    )


def _all_layers(
    teacher: Path, outcomes: dict[str, LayerOutcome], dropped: list[int]
) -> tuple[LayerOutcome, ...]:
    """The student's layers; those of a depth cut under their names in the teacher, with the ones it does without."""
    if not dropped:
        return tuple(outcomes.values())
    checkpoint = Checkpoint.open(teacher)
    kept = [index for index in range(number_of_blocks(checkpoint.config)) if index not in dropped]
    layers: list[LayerOutcome] = []
    for fact in checkpoint.facts():
        index = block_index(fact.name)
        if index is None or not is_compressible(fact.name, fact.shape):
            continue
        if index in dropped:
            layers.append(LayerOutcome(name=fact.name, action="removed", parameters=fact.elements))
        else:
            outcome = outcomes[with_block_index(fact.name, kept.index(index))]
            layers.append(outcome.model_copy(update={"name": fact.name}))
    return tuple(layers)


def _warnings(training: Training) -> tuple[str, ...]:
    if training.improved:
        return ()
    kept = "Training did not lower the held-out loss: the student is kept as it was before."
    return (f"{kept} Try a smaller learning_rate, more steps, or more text.",)
