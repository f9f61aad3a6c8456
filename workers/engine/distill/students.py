"""Where a student comes from, and how it is written when it has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from app.errors import UnsupportedForModel
from app.spec.architectures import ARCHITECTURES, architecture_in, is_compressible
from app.spec.facts import TensorFact
from app.spec.report import LayerOutcome
from workers.engine.architectures.experts import is_fused, separate_state
from workers.engine.architectures.loading import architecture_of
from workers.engine.architectures.names import name_within_base
from workers.engine.checkpoint import Checkpoint, CheckpointWriter, copy_side_files

# Below this share zeros are chance, not pruning.
_PRUNED = 0.01


def check_fit(student: Path, teacher: Path, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raise UnsupportedForModel unless the student can be taught by the teacher: same kind, same vocabulary."""
    ours, theirs = (ARCHITECTURES[architecture_of(directory)] for directory in (student, teacher))
    if ours.family != theirs.family or ours.has_labels != theirs.has_labels:
        raise UnsupportedForModel(
            f"A {ours.name} cannot learn from a {theirs.name}.",
            hint="Choose a student of the same kind: language model, classifier or encoder.",
        )
    if student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise UnsupportedForModel(
            "Student and teacher have different vocabularies, so their outputs cannot be compared.",
            hint="Choose a student that was trained with the teacher's tokenizer.",
        )


def state_by_stored_names(model: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The state of a loaded model under the names its checkpoint gives; what the model lacks is left out."""
    prefix = model.base_model_prefix
    state = model.state_dict()
    experts = architecture_in(checkpoint.config).expert_layers
    if experts is not None:
        state = separate_state(state, experts)
    within = {name_within_base(name, prefix): value for name, value in state.items()}
    stored = {name: name_within_base(name, prefix) for name in checkpoint.tensors}
    return {name: within[inner] for name, inner in stored.items() if inner in within}


def zeros_to_hold(model: Any) -> dict[str, Tensor]:
    """Masks, True off the zeros, of the weights in blocks that look pruned: more than 1 % are exactly zero."""
    masks = {
        name: parameter.detach() != 0
        for name, parameter in model.named_parameters()
        if is_compressible(name, tuple(parameter.shape)) or is_fused(name)
    }
    return {name: mask for name, mask in masks.items() if 1 - float(mask.float().mean()) > _PRUNED}


def write_student(
    model: Any, student: Path, target: Path, *, max_shard_bytes: int, is_trained: bool
) -> dict[str, LayerOutcome]:
    """Write a student in the dtypes it came in, and say for each compressible layer what became of it.

    Tensors that the loaded model has no place for (a head that was not trained) are copied.
    """
    checkpoint = Checkpoint.open(student)
    state = state_by_stored_names(model, checkpoint) if is_trained else {}
    copy_side_files(student, target)
    outcomes: dict[str, LayerOutcome] = {}
    with CheckpointWriter(target, checkpoint.facts(), max_shard_bytes) as writer:
        for fact in checkpoint.facts():
            before = checkpoint.read(fact.name)
            after = state[fact.name].to(before.device, before.dtype) if fact.name in state else before
            writer.write(fact.name, after)
            if is_compressible(fact.name, fact.shape):
                outcomes[fact.name] = _outcome(fact, before, after, is_trained=is_trained)
    return outcomes


def _outcome(fact: TensorFact, before: Tensor, after: Tensor, *, is_trained: bool) -> LayerOutcome:
    if not is_trained:
        reason = "training did not lower the held-out loss"
        return LayerOutcome(name=fact.name, action="untouched", reason=reason, parameters=fact.elements)
    moved = (after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-30)
    return LayerOutcome(
        name=fact.name,
        action="trained",
        parameters=fact.elements,
        sparsity=float((after == 0).float().mean()),
        relative_error=float(moved),
    )
