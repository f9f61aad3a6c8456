"""Parameters of the distillation techniques."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.spec.architectures import Architecture
from app.spec.base import Frozen
from app.spec.feed_forward import can_fill_gaps
from app.spec.text_training import TextTraining


class StudentFromDepthCut(Frozen):
    """The student is the teacher without the blocks that its outputs miss least on the training text."""

    LOOK_TOKENS: ClassVar[int] = 512
    """Of training text, on which it is seen what the outputs miss."""

    source: Literal["depth_cut"] = "depth_cut"
    drop_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the teacher's blocks that the student does without."""
    repair: bool | None = None
    """As in `prune.depth`, on the training text and before training."""

    REPAIR_TOKENS: ClassVar[int] = 32_768
    """Of training text, at most, that the repair is fitted to."""

    def repairs(self, architecture: Architecture) -> bool:
        """`repair`, made definite."""
        return can_fill_gaps(architecture) if self.repair is None else self.repair


class StudentFromPreviousStep(Frozen):
    """The student is what the earlier steps of this job left. Zeros they pruned stay zero."""

    source: Literal["previous_step"] = "previous_step"


class StudentFromModel(Frozen):
    """The student is another uploaded model with the teacher's vocabulary."""

    source: Literal["model"] = "model"
    model: Annotated[str, Field(pattern=r"^mdl_[0-9a-z]+$")]
    """Id of the uploaded student."""


class StudentFromTeacher(Frozen):
    """The student is the teacher itself, to be trained for a grid."""

    source: Literal["teacher"] = "teacher"


Student = Annotated[
    StudentFromDepthCut | StudentFromPreviousStep | StudentFromModel | StudentFromTeacher,
    Field(discriminator="source"),
]


class TrainingGrid(Frozen):
    """The symmetric integers that weights are rounded to while they are trained."""

    bits: Literal[8, 4, 3, 2] = 4
    group_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] | None = None
    """Inputs that share a scale. Null: one scale per output channel."""


class DistillLogits(TextTraining):
    """Train a smaller student to give the original model's outputs (Hinton et al. 2015). The teacher is the original.

    Loss: `(1 − hard_label_weight) · T² · KL(teacher ‖ student)` at temperature T, plus `hard_label_weight` times the
    cross-entropy on the next token, or, of a classifier, on the labels of the training texts where they have some. An encoder without a head is taught the teacher's
    embeddings (1 − cosine), or, where its own have another width, the similarities between the texts of a batch.
    Held-out text decides when to stop; the best state is kept.
    """

    ends_early: ClassVar[bool] = True

    technique: Literal["distill.logits"] = "distill.logits"
    student: Student = StudentFromDepthCut()
    hidden_weight: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of what hidden states differ by, block by block: ‖student − teacher‖² / ‖teacher‖². Where widths differ, a
    projection is learned with it and thrown away."""
    relation_weight: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of the relations between tokens in the last block, by queries, keys and values (MiniLMv2, Wang et al. 2021).
    Not for models in which one layer makes all three."""
    attention_weight: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of what tokens look at, block by block and head by head: KL of attention's probabilities (MobileBERT, Sun et al.
    2020). Computed step by step then, with heads · sequence_length² numbers a text and block. Not for MPNet and DeBERTa."""
    cached_logits: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Write down the teacher's so many likeliest next tokens of all text before training, in 4 bytes each (6 for more
    than 65,536 tokens in the vocabulary), and train without the teacher in memory. Null: the teacher stays. Language
    models alone, and outputs alone."""
    for_grid: TrainingGrid | None = None
    """Compute with the weights of linear layers in the blocks rounded to this grid, and leave them on it: what
    `quantize.weights` with the same bits and groups, symmetric, then stores without loss. Null: weights stay floats."""
    lora_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Train thin matrices of this rank beside the linear layers of the blocks (LoRA, Hu et al. 2022) and add them to the
    weights at the end: gradients and optimizer state of those alone. They bear a larger learning_rate. Null: train all
    weights. Not after pruning to zeros, which they would fill."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop training after this many seconds, whatever step it is at. Null: no limit of its own."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        inside = (self.hidden_weight, self.relation_weight, self.attention_weight)
        if self.cached_logits is not None and max(inside) > 0:
            raise ValueError(
                "cached_logits keeps the teacher's outputs alone: set hidden_weight, relation_weight and attention_weight to "
                "0, or leave it out"
            )
        if self.for_grid is not None and self.lora_rank is not None:
            raise ValueError(
                "adapters are added to weights that for_grid has rounded: leave out lora_rank or for_grid"
            )
        if isinstance(self.student, StudentFromTeacher) and self.for_grid is None:
            raise ValueError("a student that is the teacher has nothing to learn without for_grid")
        return self
