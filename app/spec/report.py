"""The report of a job: what was done, what was measured, what to beware of. Written by the worker, served as it is."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from app.spec.base import Frozen
from app.spec.compression import CompressionSpec

SENSITIVITY = "sensitivity of "
"""Before the name of a layer: the series of what the loss grows by with the sparsity of this layer alone."""

Verdict = Literal["accepted", "rejected", "unmeasured"]

FlagCode = Literal[
    "no_speedup",
    "dense_zeros",
    "fake_quant",
    "layers_skipped",
    "nan",
    "degenerate_output",
    "tied_weights_broken",
    "tokenizer_changed",
    "evaluation_overlap",
    "calibration_short",
    "calibration_language",
    "zero_channels",
    "dead_inputs",
    "builtin_text",
    "quality_loss",
    "larger_than_original",
]


class Flag(Frozen):
    """Something a reader must know before using the result."""

    code: FlagCode
    detail: str


class LayerOutcome(Frozen):
    """What became of one compressible layer (or block)."""

    name: str
    action: Literal["quantized", "pruned", "removed", "trained", "untouched"]
    reason: str | None = None
    """Why it was left untouched."""
    parameters: int
    bits: float | None = None
    """Stored bits per weight, scales and zero points included."""
    sparsity: float | None = None
    """Share of zeros, 0 to 1."""
    relative_error: float | None = None
    """‖W' − W‖ / ‖W‖ (Frobenius) over the layer's weight."""


class StepReport(Frozen):
    """One step as it ran."""

    technique: str
    seconds: float
    peak_memory_bytes: int | None = None
    metrics: dict[str, float | int | str | None] = Field(default_factory=dict)
    curves: dict[str, tuple[tuple[float, float], ...]] = Field(default_factory=dict)
    """Series to plot, e.g. `held_out_loss`: (step, value) pairs; `sensitivity of …`: (sparsity, nats a token) of a layer."""
    layers: tuple[LayerOutcome, ...] = ()
    warnings: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    """What the step itself found that a reader must know; they stand among the report's flags too."""


class FileSize(Frozen):
    """A file of the model."""

    path: str
    bytes: int


class Latency(Frozen):
    """Times of one kind of run, in milliseconds, over `samples_ms`."""

    what: str
    """E.g. `prefill 1×128 tokens`, `decode 1 token`, `batch 1×128 tokens`."""
    median_ms: float
    p95_ms: float
    samples_ms: tuple[float, ...]


class Measurement(Frozen):
    """One model as written on disk: its size, and how it ran in its own runtime."""

    runtime: str
    """E.g. `transformers 5.23.0, torch 2.13.0, float32, 2 threads`."""
    bytes: int
    files: tuple[FileSize, ...]
    weight_bytes: int
    """Bytes of the files that hold weights."""
    components: dict[str, int] = Field(default_factory=dict)
    """Bytes by what they hold, e.g. `embeddings`, `attention`, `scales`; they add up to `bytes`."""
    parameters: int
    low_bit_parameters: int = 0
    """Weights stored in 8 bits or fewer."""
    bits_per_weight: float
    """All weight bytes × 8 over all parameters of the original architecture's tensors that are stored."""
    zero_share: float | None = None
    """Share of stored weights that are exactly zero."""
    quality: dict[str, float] = Field(default_factory=dict)
    """`perplexity`, `bits_per_byte` for language models, `top1_accuracy` for classifiers on labels; nothing absolute for
    plain encoders."""
    latency: tuple[Latency, ...] = ()
    peak_memory_bytes: int | None = None
    """VmHWM of a process that loads this model alone and runs the evaluation (or max_memory_allocated on a GPU)."""


class Comparison(Frozen):
    """Result against original, on the same text, in turns."""

    bytes_ratio: float
    latency_ratio: float | None = None
    """Result's median over original's, for the first latency both have."""
    latency_ratio_interval: tuple[float, float] | None = None
    """95 % interval of that ratio by bootstrap over rounds: on a busy machine it is wide, and spans 1."""
    peak_memory_ratio: float | None = None
    perplexity_ratio: float | None = None
    delta_ln_perplexity: tuple[float, float, float] | None = None
    """Difference, and its 95 % interval by paired bootstrap over windows."""
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    rank_correlation: float | None = None
    """Spearman's, between the pairwise similarities of the texts under both encoders."""
    accuracy_change: tuple[float, float, float] | None = None
    """Difference of the shares of texts or images whose label is the first choice, and its 95 % interval by paired bootstrap."""
    answer_flips: float | None = None
    """Share of the original's right next tokens, or classes (its first choice was the true one), that the result
    gets wrong."""


class Limit(Frozen):
    """One acceptance limit and what was measured against it."""

    name: str
    wanted: float
    measured: float | None
    ok: bool
    note: str | None = None
    """Why nothing was measured, e.g. because the limit is for another family of models, which is then `ok`."""


class Coverage(Frozen):
    """Compressed and untouched layers add up to all compressible ones."""

    total: int
    compressed: tuple[str, ...]
    untouched: tuple[LayerOutcome, ...]


class EvaluationText(Frozen):
    """The text both models were judged on."""

    source: str
    """`built-in English prose`, or the id of a dataset."""
    sha256: str
    tokens: int
    windows: int
    """Windows of a language model, or texts of an encoder or with labels."""
    sequence_length: int
    """Tokens per window, or at most per text, special tokens not counted."""
    labelled: bool = False
    """Whether each text has a label, so that a classifier's accuracy could be measured."""
    overlap_share: float | None = None
    """Share of its 13-token sequences that also stand in calibration or training text; null when there was none."""


class EvaluationImages(Frozen):
    """The images both models were judged on."""

    source: str
    """The id of a dataset."""
    sha256: str
    images: int
    labelled: bool
    """Whether they have labels, so that accuracy could be measured."""
    height: int
    """Of what the models saw."""
    width: int
    overlap_share: float | None = None
    """Share of them that are, pixel for pixel (of picture files byte for byte), also among the calibration images; null when there were none."""


class TextSample(Frozen):
    """What both models write after the same prompt, always taking the likeliest token."""

    prompt: str
    original: str
    result: str


class Report(Frozen):
    """All of it."""

    model_config = ConfigDict(title="Report")

    version: Literal[1] = 1
    job_id: str
    created_at: str
    modelpress: str
    """Version of Modelpress."""
    machine: dict[str, Any]
    """Processor, cores, memory, device, library versions."""
    model_name: str
    architecture: str
    family: str
    spec: CompressionSpec
    verdict: Verdict
    flags: tuple[Flag, ...]
    limits: tuple[Limit, ...]
    original: Measurement
    result: Measurement
    comparison: Comparison | None
    evaluation_text: EvaluationText | None = None
    evaluation_images: EvaluationImages | None = None
    samples: tuple[TextSample, ...] = ()
    uploaded_bytes: int | None = None
    """Bytes of the weights as uploaded, where that was not safetensors (a GGUF, say, smaller than `original`)."""
    uploaded_dtype: str | None = None
    """What those weights were stored as, e.g. `Q4_1`."""
    coverage: Coverage
    steps: tuple[StepReport, ...]
    stage_seconds: dict[str, float]
