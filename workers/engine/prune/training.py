"""prune.training: prune little by little while training, on the loop and the losses of distillation.

Idea: what is removed at once is missed at once; removed in small parts while the others are trained, it is made up for
on the way. Which weights go is said by `gates`: small ones on a schedule, those that training moves towards zero, or
those whose gates are learned shut. At the end the gates are multiplied in, and a plain model is left.
Left out: structured gates; a teacher other than the original.
"""

from __future__ import annotations

from typing import Any

import torch

from app.spec.architectures import is_expert
from app.spec.prune_training import LearnedGates, PruneTraining
from workers.engine.architectures.experts import is_fused
from workers.engine.architectures.loading import load_model
from workers.engine.architectures.names import name_within_base
from workers.engine.calibration.block_journal import open_journal
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.selection import Selection, select_layers
from workers.engine.distill.blocks import recompute_activations
from workers.engine.distill.objectives import Classroom, objective_for
from workers.engine.distill.preparation import PREPARING, journal_key, training_dtype, training_text
from workers.engine.distill.snapshots import Snapshots
from workers.engine.distill.students import write_student, zeros_to_hold
from workers.engine.distill.texts import Batch
from workers.engine.distill.training import train
from workers.engine.prune.gates import (
    Gates,
    HardConcreteGates,
    MovementGates,
    ScheduledGates,
    share_of_zeros,
)
from workers.engine.technique import StepContext, StepOutcome, implements

_TRAINED = 0.95
_FEW_ZEROS = 0.01


@implements(PruneTraining)
def prune_training(step: PruneTraining, context: StepContext) -> StepOutcome:
    """Write `context.target` with the chosen layers pruned and all weights trained.

    Raises InvalidRequest when the training text is too short; JobFailed when training diverged.
    """
    torch.manual_seed(context.seed)
    checkpoint = Checkpoint.open(context.source)
    selection = select_layers(checkpoint, step.ignore)
    text = training_text(step, context)
    with open_journal(context.journal, context.target.parent, journal_key(step, context)) as journal:
        room = _classroom(step, context, text.held_out)
        gates = _gates(step, context, room.student, selection)
        training = train(
            objective_for(room, context.facts, context.original),
            text.batches(),
            step,
            batches_a_step=step.gradient_accumulation,
            zeros=zeros_to_hold(room.student),
            snapshots=Snapshots(journal.directory),
            progress=lambda share, what: context.progress(PREPARING + (_TRAINED - PREPARING) * share, what),
            pruning=gates,
        )
        gates.settle()
        context.progress(_TRAINED, "writing the result")
        written = write_student(
            room.student,
            context.source,
            context.target,
            max_shard_bytes=context.max_shard_bytes,
            is_trained=True,
        )
    context.progress(1.0, "done")
    sparsity = share_of_zeros(gates.weights)
    return StepOutcome(
        layers=tuple(
            layer.model_copy(update={"action": "pruned"}) if name in selection.chosen else layer
            for name, layer in written.items()
        ),
        metrics=training.metrics() | {"sparsity": sparsity},
        curves=training.curves() | ({"sparsity": step.points} if step.points else {}),
        warnings=(*selection.warnings, *_warnings(step, sparsity)),
    )


def _classroom(step: PruneTraining, context: StepContext, held_out: tuple[Batch, ...]) -> Classroom:
    dtype, teacher = training_dtype(context.device), None
    if step.asks_teacher(context.facts.family):
        teacher = load_model(context.original, dtype=dtype, device=context.device)
    student = load_model(context.source, device=context.device)
    if step.gradient_checkpointing:
        recompute_activations(student)
    context.progress(PREPARING, "model is loaded")
    return Classroom(student, teacher, step, held_out, context.device, dtype)


def _gates(step: PruneTraining, context: StepContext, student: Any, selection: Selection) -> Gates:
    """Gates on the chosen layers; experts are chosen all or none, for they share a parameter."""
    prefix = student.base_model_prefix
    chosen = {name_within_base(name, prefix) for name in selection.chosen}
    has_experts = any(is_expert(name) for name in chosen)
    names = [
        name
        for name, _ in student.named_parameters()
        if name_within_base(name, prefix) in chosen or (has_experts and is_fused(name))
    ]
    if isinstance(step.method, LearnedGates):
        penalty, rate = step.method.penalty, step.method.gate_learning_rate
        return HardConcreteGates(student, names, penalty=penalty, rate=rate, seed=context.seed)
    kind = MovementGates if step.method.name == "movement" else ScheduledGates
    return kind(student, names, step.points, together=step.method.scope == "global")


def _warnings(step: PruneTraining, sparsity: float) -> tuple[str, ...]:
    if step.points or sparsity >= _FEW_ZEROS:
        return ()
    return (
        f"Only {sparsity:.1%} of the gates are closed: try a larger penalty or gate_learning_rate, or more steps.",
    )
