"""What all techniques share that train a model of text."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from app.spec.base import Step


class TextTraining(Step):
    """How long is trained, how fast, on how much at once, and on which loss."""

    needs_training: ClassVar[bool] = True

    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softens both distributions; 1 compares them as they are, which measured best for language models."""
    hard_label_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Weight of the cross-entropy on the true next token, or on a text's label, between 0 and 1. Not for encoders, nor for
    texts without labels."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Peak rate of AdamW; warmed up over 5 % of the steps, then cosine to a tenth."""
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """Optimizer steps at most."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    """Sequences computed at once. In little time on a CPU 2 teach a language model more; encoders want 16."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=4096)] = 1
    """Batches whose gradients one optimizer step adds up: as many times the batch, in the memory of one."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block, and compute the rest again for the gradient: a third more time, far less memory."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 128
    """Tokens per sequence."""
    evaluate_every: Annotated[int, Field(ge=1)] = 20
    """Steps between looks at the held-out loss."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Looks without a better held-out loss before training stops."""
    held_out_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the training text that is never trained on: its end, or, where documents are learned one by one, any of them."""

    @property
    def sequences(self) -> int:
        """Sequences that all steps see together, each as often as it is seen."""
        return self.max_steps * self.gradient_accumulation * self.batch_size
