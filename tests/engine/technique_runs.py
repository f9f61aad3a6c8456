"""Run every technique on tiny models, once a session each, and keep what it wrote and said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import facts_of

from app.spec.architectures import ARCHITECTURES, Architecture
from app.spec.base import Step
from app.spec.compression import STEP_CLASSES
from app.spec.gguf_layout import ARCHITECTURES as GGUF_ARCHITECTURES
from app.spec.layouts import limits_of_layout
from workers.engine.technique import StepContext, StepOutcome, run_step

# More than the defaults of a technique, or less where the defaults would train for minutes.
SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    "quantize.weights": {
        "int4": {"group_size": 32},
        "int8": {"bits": 8, "scale_search": "absmax"},
        "int3-asymmetric": {"bits": 3, "symmetric": False, "group_size": 16},
        "fp8-tensor": {"number_format": "fp8", "group_size": "tensor", "activations": "dynamic"},
        "nvfp4": {"number_format": "nvfp4"},
        "nf4": {"number_format": "nf4", "double_quantized": True},
        "hqq": {"symmetric": False, "group_size": 32, "scale_search": "hqq"},
    },
    "quantize.calibrated": {
        "int4": {"group_size": 32, "calibration_tokens": 1024},
        "int8-asymmetric": {"bits": 8, "symmetric": False, "calibration_tokens": 256},
        "int2": {"bits": 2, "group_size": 16, "calibration_tokens": 1024},
        "w8a8-static": {"bits": 8, "activations": "static", "calibration_tokens": 256},
        "mxfp4": {"number_format": "mxfp4", "calibration_tokens": 256},
        "fp8-cache": {"number_format": "fp8", "activations": "dynamic", "kv_cache": "fp8", "calibration_tokens": 256},
        "tuned": {"solver": "signround", "tuning_steps": 3, "scaling": "smoothquant", "calibration_tokens": 256},
        "awq": {"solver": "nearest", "scaling": "awq", "bias_correction": True, "calibration_tokens": 256},
    },
    "quantize.onnx": {
        "int4-asymmetric": {"bits": 4, "symmetric": False, "block_size": 16, "calibration_tokens": 256},
        "qdq": {"method": "qdq", "smoothing": 0.5, "ranges": "mse", "calibration_tokens": 256},
    },
    "quantize.gguf": {
        "Q4_K_M": {"calibration_tokens": 512},
        "Q4_0-nearest": {"mix": "Q4_0", "compensate": False, "calibration_tokens": 256},
        "Q5_K_M": {"mix": "Q5_K_M", "calibration_tokens": 512},
        "Q8_0": {"mix": "Q8_0", "calibration_tokens": 256},
    },
    "quantize.dynamic": {"blocks": {"ignore": ["*.0.*"]}},
    "prune.magnitude": {
        "half": {},
        "global": {"scope": "global", "sparsity": 0.3},
        "2:4": {"pattern": "2:4"},
    },
    "prune.calibrated": {
        "half": {"calibration_tokens": 256},
        "2:4": {"pattern": "2:4", "calibration_tokens": 256},
        "wanda": {"criterion": "wanda", "compensate": False, "pattern": "4:8", "calibration_tokens": 256},
        "taylor": {"criterion": "taylor", "calibration_tokens": 256},
        "gradient": {"criterion": "gradient", "compensate": False, "pattern": "2:4", "calibration_tokens": 256},
    },
    "prune.depth": {"one": {"drop_blocks": 1, "calibration_tokens": 256}},
    "prune.width": {"half": {"drop_ratio": 0.5, "round_to": 16, "calibration_tokens": 256}},
    "prune.hidden": {"three-quarters": {"calibration_tokens": 256}},
    "prune.heads": {"half": {"drop_ratio": 0.5, "calibration_tokens": 256}},
    "distill.logits": {
        "three-steps": {
            "max_steps": 3, "sequence_length": 16, "batch_size": 2, "evaluate_every": 2,
            "student": {"source": "depth_cut", "drop_ratio": 0.25},
        }
    },
    "prune.experts": {
        "half": {"drop_ratio": 0.5, "calibration_tokens": 256},
        "usage": {"criterion": "usage", "calibration_tokens": 256},
    },
    "prune.training": {
        "gradual": {
            "max_steps": 4, "sequence_length": 16, "batch_size": 2, "evaluate_every": 2,
            "method": {"name": "magnitude", "schedule": {"shape": "list", "points": [[1, 0.3], [3, 0.5]]}},
        },
        "movement": {
            "max_steps": 3, "sequence_length": 16, "batch_size": 2, "hard_label_weight": 1.0,
            "method": {"name": "movement", "scope": "global", "schedule": {"shape": "cubic", "begin": 1, "end": 3, "every": 1}},
        },
        "l0": {
            "max_steps": 3, "sequence_length": 16, "batch_size": 2,
            "method": {"name": "l0", "penalty": 100, "gate_learning_rate": 6.0},
        },
    },
    "optimize.onnx": {"int8": {}},
}  # fmt: skip
# Techniques that some architectures of their families are refused to.
ACCEPTED: dict[str, Collection[str]] = {"quantize.gguf": GGUF_ARCHITECTURES}
# One of each family and kind of head. Settings after a technique's first run on these alone in the fast set.
REPRESENTATIVE = ("LlamaForCausalLM", "BertModel", "DistilBertForSequenceClassification")
# One of each kind of layout beside those: transposed weights, experts, fused projections, norms of another kind.
UNUSUAL = (
    "GPT2LMHeadModel", "MixtralForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM", "ModernBertForMaskedLM",
)  # fmt: skip
# Built as others are, of the same kinds of layers: in the slow set alone.
ALIKE = (
    "CohereForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
    "GPTNeoXForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "ElectraForMaskedLM", "ElectraForSequenceClassification",
    "ModernBertForMaskedLM", "ModernBertForSequenceClassification", "DebertaV2ForMaskedLM",
    "DebertaV2ForSequenceClassification",
)  # fmt: skip
# Seconds a run: the slow set alone has every architecture that is not built as another is.
EXPENSIVE: dict[str, tuple[str, ...]] = {
    "distill.logits": ("LlamaForCausalLM", "BertModel", "RobertaForSequenceClassification"),
    "prune.training": ("LlamaForCausalLM", "BertModel"),
    "optimize.onnx": ("LlamaForCausalLM", "DistilBertForSequenceClassification"),
    "quantize.onnx": ("LlamaForCausalLM", "DistilBertForSequenceClassification"),
}
# Their time is PyTorch's export, which test_onnx_export runs on every architecture: one of each kind of layout here.
EXPORTING = ("optimize.onnx", "quantize.onnx")
# Where even one more run of each representative is too many for the fast set.
REPEATABLE: dict[str, tuple[str, ...]] = {
    "distill.logits": ("BertModel",),
    "prune.training": ("BertModel",),
    "optimize.onnx": ("DistilBertForSequenceClassification",),
    "quantize.onnx": ("DistilBertForSequenceClassification",),
}


@dataclass(frozen=True)
class Case:
    """One technique with one setting, on one architecture."""

    step: Step
    architecture: str
    label: str

    @property
    def is_slow(self) -> bool:
        """Whether it is left out of the fast set."""
        is_first = self.label == next(iter(SETTINGS.get(self.technique, {self.label: {}})))
        fast = tuple(a for a in ARCHITECTURES if a not in ALIKE) if is_first else REPRESENTATIVE
        return self.architecture not in EXPENSIVE.get(self.technique, fast)

    @property
    def technique(self) -> str:
        """The technique's name, e.g. `prune.depth`."""
        return str(self.step.model_dump()["technique"])

    def __str__(self) -> str:
        """What pytest shows."""
        return f"{self.technique}-{self.label}-{self.architecture}"


def all_cases() -> list[Case]:
    """Every technique there is: its first setting on every architecture it takes, others on each kind of layout."""
    cases = []
    for step_class in STEP_CLASSES:
        name = step_class.model_fields["technique"].default
        for number, (label, settings) in enumerate(SETTINGS.get(name, {"defaults": {}}).items()):
            step = step_class(**settings)
            cases += [
                Case(step, a.name, label)
                for a in ARCHITECTURES.values()
                if a.name in _architectures(name, is_first=number == 0)
                and _is_possible(step, a)
                and a.name in ACCEPTED.get(name, ARCHITECTURES)
            ]
    return cases


def _architectures(technique: str, *, is_first: bool) -> tuple[str, ...]:
    """Those a setting of a technique is run on."""
    if not is_first or technique in EXPORTING:
        return (*REPRESENTATIVE, *UNUSUAL)
    return tuple(a for a in ARCHITECTURES if technique not in EXPENSIVE or a not in ALIKE)


def _is_possible(step: Step, architecture: Architecture) -> bool:
    """Whether a job of this step alone would be accepted for such a model; those of images have a contract of their own."""
    is_text = not architecture.takes_images
    return (
        is_text and architecture.family in step.families and not [*limits_of_layout(step, architecture, ())]
    )


@dataclass
class Run:
    """What a technique was given, wrote and said."""

    case: Case
    source: Path
    target: Path
    outcome: StepOutcome
    source_before: dict[str, str]
    source_after: dict[str, str]
    progress: list[tuple[float, str]] = field(default_factory=list)


def run_case(
    case: Case, source: Path, target: Path, text: Path, *, seed: int = 0, device: str = "cpu"
) -> Run:
    """Run a technique into `target`."""
    said: list[tuple[float, str]] = []
    before = digests(source)
    context = context_for(
        case.step,
        source,
        target,
        text,
        seed=seed,
        device=device,
        progress=lambda share, message: said.append((share, message)),
    )
    outcome = run_step(case.step, context)
    return Run(case, source, target, outcome, before, digests(source), said)


def context_for(
    step: Step,
    source: Path,
    target: Path,
    text: Path,
    *,
    progress: Callable[[float, str], None] = lambda *_: None,
    seed: int = 0,
    device: str = "cpu",
) -> StepContext:
    """The context a pipeline would give."""
    return StepContext(
        source=source,
        target=target,
        original=source,
        facts=facts_of(source),
        calibration_text=text if step.needs_calibration else None,
        training_text=text if step.needs_training else None,
        device=device,
        threads=2,
        seed=seed,
        progress=progress,
    )


def digests(directory: Path) -> dict[str, str]:
    """The sha256 of every file, hidden ones too, by path."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
