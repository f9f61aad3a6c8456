"""CompressionSpec: everything that decides what a job does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.spec.base import Format, Frozen, Step
from app.spec.distill import DistillLogits, StudentFromModel, StudentFromPreviousStep
from app.spec.export import Export
from app.spec.gguf import QuantizeGguf
from app.spec.optimize import OptimizeOnnx
from app.spec.prune import PruneCalibrated, PruneDepth, PruneHeads, PruneMagnitude, PruneWidth
from app.spec.prune_channels import PruneChannels
from app.spec.prune_experts import PruneExperts
from app.spec.prune_hidden import PruneHidden
from app.spec.prune_training import PruneTraining
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from app.spec.quantize_dynamic import QuantizeDynamic
from app.spec.quantize_onnx import QuantizeOnnx

AnyStep = Annotated[
    QuantizeWeights
    | QuantizeCalibrated
    | QuantizeOnnx
    | QuantizeGguf
    | QuantizeDynamic
    | PruneMagnitude
    | PruneCalibrated
    | PruneDepth
    | PruneWidth
    | PruneHeads
    | PruneHidden
    | PruneExperts
    | PruneTraining
    | PruneChannels
    | DistillLogits
    | OptimizeOnnx,
    Field(discriminator="technique"),
]

STEP_CLASSES: tuple[type[Step], ...] = (
    QuantizeWeights,
    QuantizeCalibrated,
    QuantizeOnnx,
    QuantizeGguf,
    QuantizeDynamic,
    PruneMagnitude,
    PruneCalibrated,
    PruneDepth,
    PruneWidth,
    PruneHeads,
    PruneHidden,
    PruneExperts,
    PruneTraining,
    PruneChannels,
    DistillLogits,
    OptimizeOnnx,
)


DatasetId = Annotated[str, Field(pattern=r"^dst_[0-9a-z]+$")]


class TextSource(Frozen):
    """Where text comes from: an uploaded dataset, or the English prose that ships with Modelpress.

    For models of images, an uploaded dataset of images; none ship with Modelpress.
    """

    dataset: DatasetId | None = None
    """Id of an uploaded dataset. Null: the built-in text; fine to try things out, not for a model of another
    language or purpose."""


class Evaluation(Frozen):
    """How quality and speed are measured: original and result in turns, on the same text."""

    enabled: bool = True
    """False: the result is reloaded and checked but not compared; the verdict is then `unmeasured`."""
    text: TextSource = TextSource()
    tokens: Annotated[int, Field(ge=256, le=10_000_000)] = 4096
    """Tokens of text to measure quality on. More narrows the confidence interval and takes longer."""
    sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    """Tokens per window; cut to what the model can take."""
    texts: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """The same for classifiers and texts with labels: how many of the dataset, spread evenly over it. Of longer ones the
    first `sequence_length` tokens."""
    images: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """The same for models of images: how many of the dataset, drawn by chance, and the same in every job."""
    latency_rounds: Annotated[int, Field(ge=3, le=1000)] = 10
    """Timed runs of each model, in turns, after warm-up."""


class Acceptance(Frozen):
    """Limits that decide the verdict. A result that misses one is kept, and marked `rejected`."""

    max_perplexity_increase: Annotated[float, Field(ge=0)] | None = None
    """Relative: 0.05 allows a perplexity up to 5 % above the original's. Language models."""
    max_kl: Annotated[float, Field(ge=0)] | None = None
    """Mean Kullback-Leibler divergence from the original's next-token distribution (or of classes, of image classifiers), in nats."""
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of positions where both choose the same token (or class)."""
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of texts or images by which fewer get their label as first choice: 0.01 allows 75 % where the original has 76 %.
    Classifiers, on a dataset with labels."""
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Mean cosine between the embeddings of original and result. Encoders."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Total bytes of the result's files."""
    max_bytes_ratio: Annotated[float, Field(gt=0)] | None = None
    """Bytes of the result over bytes of the original."""
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = None
    """Median latency of the result over the original's, each in its own runtime, same worker."""
    max_peak_memory_ratio: Annotated[float, Field(gt=0)] | None = None
    """Peak memory of a process that loads and runs the result, over the original's."""

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {k: v for k, v in self.model_dump().items() if v is not None}


class Resources(Frozen):
    """What a job may use."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: whatever the worker that takes the job has. `cuda`: only workers with a GPU take the job. Of several GPUs that
    a worker is shown (CUDA_VISIBLE_DEVICES) calibration uses all, everything else the first."""
    memory_budget: Annotated[int, Field(ge=256 * 2**20)] | None = None
    """Bytes of memory the job's process may use. Null: the worker's size. A plan over budget is refused."""
    timeout_seconds: Annotated[int, Field(ge=1, le=30 * 86_400)] = 86_400
    """The job fails if it runs longer, all tries together not counted."""


class CompressionSpec(Frozen):
    """What to do to a model, in which order, and how to judge the result."""

    steps: Annotated[tuple[AnyStep, ...], Field(min_length=1, max_length=16)]
    """Carried out in order, each on what the one before left."""
    calibration: TextSource = TextSource()
    """Text, or images, that techniques run the model over, e.g. to find out which blocks matter."""
    training: TextSource = TextSource()
    """Text that distillation and `prune.training` train on. For results worth having, your own."""
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    acceptance: Acceptance = Acceptance()
    resources: Resources = Resources()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Same model, spec and seed on the same machine: same bytes."""

    @model_validator(mode="after")
    def _steps_fit_together(self) -> CompressionSpec:
        for number, step in enumerate(self.steps[:-1]):
            if step.output_format != "safetensors":
                raise ValueError(
                    f"steps/{number}: {step.technique} writes {step.output_format}, which no other step can read: put it last"
                )
        first = self.steps[0]
        if isinstance(first, DistillLogits) and isinstance(first.student, StudentFromPreviousStep):
            raise ValueError(  # noqa: TRY004 - pydantic makes a fault of a ValueError alone
                'steps/0: student "previous_step" needs a step before it; use "depth_cut" or "model"'
            )
        for number, step in enumerate(self.steps[1:], start=1):
            if isinstance(step, DistillLogits) and not isinstance(step.student, StudentFromPreviousStep):
                raise ValueError(  # noqa: TRY004 - the same
                    f'steps/{number}: after other steps only student "previous_step" makes sense; their work would be lost'
                )
        wanted = self.export.format
        if wanted not in ("auto", self.output_format):
            raise ValueError(
                f"export/format: the last step, {self.steps[-1].technique}, writes {self.output_format}, not {wanted}"
            )
        return self

    @model_validator(mode="after")
    def _zeros_are_not_filled(self) -> CompressionSpec:
        is_sparse = False
        for number, step in enumerate(self.steps):
            if is_sparse and isinstance(step, PruneWidth | PruneHeads | PruneHidden):
                raise ValueError(
                    f"steps/{number}: {step.technique} would fill the zeros of the step before it: put it first"
                )
            if is_sparse and isinstance(step, DistillLogits) and step.lora_rank is not None:
                raise ValueError(
                    f"steps/{number}: lora_rank would fill the zeros of the step before it: leave it out, and they are held"
                )
            is_sparse |= isinstance(step, PruneMagnitude | PruneCalibrated | PruneTraining)
        return self

    @property
    def output_format(self) -> Format:
        """The format the result is written in."""
        return self.steps[-1].output_format

    def dataset_ids(self) -> set[str]:
        """Ids of the uploaded datasets this spec will really read."""
        sources = [self.evaluation.text] if self.evaluation.enabled else []
        if any(step.needs_calibration for step in self.steps):
            sources.append(self.calibration)
        if any(step.needs_training for step in self.steps):
            sources.append(self.training)
        return {s.dataset for s in sources if s.dataset is not None}

    def student_model_id(self) -> str | None:
        """Id of an uploaded student, if a step names one."""
        for step in self.steps:
            if isinstance(step, DistillLogits) and isinstance(step.student, StudentFromModel):
                return step.student.model
        return None

    def stage_names(self) -> tuple[str, ...]:
        """The stages of a job with this spec, in order; each is committed by itself and never run twice in effect."""
        steps = (f"step {number}: {step.technique}" for number, step in enumerate(self.steps, start=1))
        return ("load", "baseline", *steps, "export", "verify", "report")

    def training_stages(self) -> tuple[int, ...]:
        """Numbers, from 0, of the stages whose training can be ended early."""
        first = self.stage_names().index("baseline") + 1
        return tuple(first + number for number, step in enumerate(self.steps) if step.ends_early)
