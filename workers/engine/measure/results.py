"""What measuring is asked and what it answers: values that can be saved as JSON between the stages of a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.spec.base import Format, Frozen
from app.spec.report import Comparison, EvaluationImages, EvaluationText, Measurement, TextSample

Kind = Literal["causal_lm", "classifier", "encoder", "image_classifier"]
"""What a model gives: next-token logits, logits of a class, an embedding per token, or logits of an image's class."""

Progress = Callable[[float, str], None]


def silent(fraction: float, message: str) -> None:
    """Discard progress: for callers that do not show it."""


class Prepared(Frozen):
    """Evaluation text, cut into windows of tokens once, by the original's tokenizer, for both models; or images, made ready."""

    kind: Kind
    windows_file: Path
    """The windows with their special tokens (see windows.py), or the images (see images.py)."""
    scored_bytes: int = 0
    """UTF-8 bytes of the text whose tokens are predicted: what bits per byte divides by."""
    text: EvaluationText | None = None
    images: EvaluationImages | None = None
    labels: tuple[int, ...] | None = None
    """Classes of the images, or of a classifier's texts, in order; None where they have none."""


class Loading(Frozen):
    """What the target's own loader said about a directory."""

    missing: tuple[str, ...] = ()
    """Weights the model has and the files have not: the loader made them up."""
    unexpected: tuple[str, ...] = ()
    """Tensors in the files that the model has no place for: the loader dropped them."""
    mismatched: tuple[str, ...] = ()
    """Tensors of another shape than the model's."""


class RunnerFacts(Frozen):
    """One loaded model, as its own process sees it."""

    runtime: str
    format: Format
    loading: Loading
    tied: bool | None = None
    """Input and output embeddings are one tensor in memory; None where there are no two, or the runtime cannot tell."""
    caches: bool = False
    """The runtime can decode token by token with a key-value cache."""
    load_seconds: float


class Verification(Frozen):
    """What a fresh process found that knew only the exported files. Made only when all of it is sound."""

    original: RunnerFacts
    result: RunnerFacts
    tokenizer_changes: tuple[str, ...] = ()
    """In words; empty when both tokenizers do the same."""
    output_cosine: float
    """Between the outputs of original and result on one short text, flattened."""
    samples: tuple[TextSample, ...] = ()
    degenerate: str | None = None
    """Why the result's outputs are worthless although they are finite, in words."""


class Evaluated(Frozen):
    """Everything measured about an original and its result."""

    original: Measurement
    result: Measurement
    comparison: Comparison | None
    """None when evaluation was disabled."""
    verification: Verification
    text: EvaluationText | None
    images: EvaluationImages | None = None
    vocabulary: tuple[int, int] | None = None
    """Columns of the two models' logits, where they differ."""
    non_finite_windows: int = 0
    """Windows on which the result gave NaN or infinity; they are left out of the averages."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An original and its result, on disk, and the means to run them."""

    original: Path
    """The model as it came in, in Hugging Face layout."""
    result: Path
    """The exported directory. Nothing else of the job is looked at."""
    work: Path
    """A directory for what is passed between processes; about the bytes of one window's outputs, twice."""
    device: str = "cpu"
    threads: int = 2
    seed: int = 0
    latency_rounds: int = 10
    progress: Progress = silent
    """Called after each window and each round with a fraction from 0 to 1. May raise to stop."""
