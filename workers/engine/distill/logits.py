"""Distillation: a student learns to give its teacher's outputs.

Idea: the teacher's distribution over all answers says more than the one right answer; a student trained on it, softened
by a temperature so that small probabilities count, needs little text to recover what a cut took away.
Paper: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network". An encoder without a head has no such
distribution: it is taught the embeddings themselves, by 1 − cosine, texts pooled as the model's own 1_Pooling says, by
the mean without one. Where student and teacher differ in width, rows of the matrix of similarities within a batch take
the place of logits (Park et al. 2019, "Relational Knowledge Distillation").
Left out: matching hidden states and attention; cached logits (the teacher stays in memory); dropout (off throughout).
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from app.errors import UnsupportedForModel
from app.spec.architectures import block_index, is_compressible, with_block_index
from app.spec.base import Family
from app.spec.distill import DistillLogits, StudentFromDepthCut, StudentFromModel
from app.spec.report import LayerOutcome
from workers.engine.architectures.block_removal import number_of_blocks, remove_blocks
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.block_journal import open_journal
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.layout import weight_files
from workers.engine.distill.blocks import recompute_activations
from workers.engine.distill.objectives import (
    Classes,
    Classroom,
    Embeddings,
    NextToken,
    pools_first_token,
)
from workers.engine.distill.snapshots import Snapshots
from workers.engine.distill.students import check_fit, evenly_spread, write_student, zeros_to_hold
from workers.engine.distill.texts import TrainingText, document_text, stream_text
from workers.engine.distill.training import Objective, Training, train
from workers.engine.technique import StepContext, StepOutcome, implements

_TRAINING = 0.95


@implements(DistillLogits)
def distill_logits(spec: DistillLogits, context: StepContext) -> StepOutcome:
    """Train a student on the training text by the original's outputs and write its best state.

    Raises UnsupportedForModel when the student cannot be compared with the teacher, InvalidRequest when the text is
    too short or too few blocks would be left.
    """
    torch.manual_seed(context.seed)
    with _student_directory(spec, context) as (directory, dropped):
        tokenizer = load_tokenizer(directory)
        check_fit(directory, context.original, tokenizer, load_tokenizer(context.original))
        text = _training_text(spec, context, tokenizer)
        objective, student = _objective(spec, context, directory, text)
        with open_journal(context.journal, context.target.parent, _journal_key(spec, context)) as journal:
            training = train(
                objective,
                text.batches(),
                spec,
                zeros=zeros_to_hold(student),
                snapshots=Snapshots(journal.directory),
                progress=lambda share, message: context.progress(_TRAINING * share, message),
            )
        context.progress(_TRAINING, "writing the student")
        outcomes = write_student(
            student,
            directory,
            context.target,
            max_shard_bytes=context.max_shard_bytes,
            is_trained=training.improved,
        )
    context.progress(1.0, "done")
    layers = _all_layers(context.original, outcomes, dropped)
    return StepOutcome(
        layers=layers,
        metrics=_metrics(training),
        curves={"training_loss": _finite(training.losses), "held_out_loss": _finite(training.held_out)},
        warnings=_warnings(training),
    )


@contextmanager
def _student_directory(spec: DistillLogits, context: StepContext) -> Iterator[tuple[Path, list[int]]]:
    """The student before training, and which of the teacher's blocks it does without."""
    if isinstance(spec.student, StudentFromModel):
        if context.student is None:
            raise ValueError("the spec names a student, and none was fetched")
        yield context.student, []
    elif isinstance(spec.student, StudentFromDepthCut):
        blocks = number_of_blocks(Checkpoint.open(context.original).config)
        dropped = evenly_spread(blocks, max(1, round(spec.student.drop_ratio * blocks)))
        with tempfile.TemporaryDirectory(dir=context.target.parent, prefix="student-") as cut:
            remove_blocks(
                context.original,
                Path(cut),
                dropped,
                max_shard_bytes=context.max_shard_bytes,
                progress=lambda share, message: context.progress(0.0, message),  # noqa: ARG005
            )
            yield Path(cut), dropped
    else:
        yield context.source, []


def _journal_key(spec: DistillLogits, context: StepContext) -> str:
    """The same for the same training: what its snapshots were begun for."""
    files = [
        (file.name, (stat := file.stat()).st_size, stat.st_mtime_ns)
        for directory in dict.fromkeys((context.source, context.original, context.student))
        if directory is not None
        for file in weight_files(directory)
    ]
    text = context.training_text.read_bytes() if context.training_text else b""
    digest = hashlib.sha256(text)
    digest.update(f"{spec.model_dump_json()} {files} {context.device} {context.seed}".encode())
    return digest.hexdigest()


def _training_text(spec: DistillLogits, context: StepContext, tokenizer: Any) -> TrainingText:
    if context.training_text is None:
        raise ValueError("distill.logits needs training text")
    make = stream_text if context.facts.family is Family.CAUSAL_LM else document_text
    return make(spec, context.training_text, tokenizer, context.facts, seed=context.seed)


def _objective(
    spec: DistillLogits, context: StepContext, directory: Path, text: TrainingText
) -> tuple[Objective, Any]:
    dtype = _compute_dtype(context.device)
    student = load_model(directory, dtype=torch.float32, device=context.device)
    if spec.gradient_checkpointing:
        recompute_activations(student)
    teacher = load_model(context.original, dtype=dtype, device=context.device)
    room = Classroom(student, teacher, spec, text.held_out, context.device, dtype)
    if context.facts.family is Family.CAUSAL_LM:
        rows = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
        _check_equal("rows in their output layers", rows)
        return NextToken(room), student
    if context.facts.architecture.endswith("ForSequenceClassification"):
        _check_equal("classes", [model.config.num_labels for model in (student, teacher)])
        return Classes(room), student
    return Embeddings(room, first_token=pools_first_token(context.original)), student


def _check_equal(what: str, counts: list[int]) -> None:
    if counts[0] != counts[1]:
        raise UnsupportedForModel(
            f"The student has {counts[0]} {what}, the teacher {counts[1]}.",
            hint="Choose a student whose outputs mean the same as the teacher's.",
        )


def _compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively; emulated it is slower than fp32."""
    if device == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # noqa: SLF001
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


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


def _metrics(training: Training) -> dict[str, float | int | str | None]:
    return {
        "held_out_loss_before": training.held_out[0][1],
        "held_out_loss_after": training.best,
        "steps": training.steps,
        "tokens_per_second": training.tokens / training.seconds,
        "stopped_by": training.stopped_by,
    }


def _finite(series: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """A curve without the points where training diverged, which JSON cannot carry."""
    return tuple(point for point in series if math.isfinite(point[1]))


def _warnings(training: Training) -> tuple[str, ...]:
    if training.improved:
        return ()
    kept = "Training did not lower the held-out loss: the student is kept as it was before."
    return (f"{kept} Try a smaller learning_rate, more steps, or more text.",)
