"""The jobs of the demo: one of each kind, sized to end within minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_EVALUATION = {"tokens": 2048, "latency_rounds": 5}


@dataclass(frozen=True)
class DemoJob:
    """A job: its name in the table, the model it works on, and its steps."""

    label: str
    model: str
    steps: tuple[dict[str, Any], ...]
    acceptance: dict[str, float] = field(default_factory=dict)
    trains: bool = False

    @property
    def directory(self) -> str:
        """The label as a file name."""
        return self.label.replace(" ", "-").replace(":", "-")

    def request(self, ids: dict[str, str]) -> dict[str, Any]:
        """The body of `POST /v1/jobs`."""
        spec: dict[str, Any] = {
            "steps": self.steps,
            "evaluation": _EVALUATION,
            "acceptance": self.acceptance,
        }
        if self.trains:
            spec["training"] = {"dataset": ids["training text"]}
        return {"model": ids[self.model], "name": self.label, "spec": spec}


_PRUNED = {"max_perplexity_increase": 0.5}
_FEWER_BLOCKS = {"technique": "prune.depth", "drop_ratio": 0.1, "calibration_tokens": 1024}

FIRST = (
    DemoJob(
        "SmolLM2 int8",
        "smollm2",
        ({"technique": "quantize.weights", "bits": 8},),
        {"max_perplexity_increase": 0.01},
    ),
    DemoJob(
        "SmolLM2 int4",
        "smollm2",
        ({"technique": "quantize.weights", "bits": 4, "group_size": 32},),
        {"max_perplexity_increase": 0.25},
    ),
)
SECOND = (
    DemoJob("MiniLM onnx", "minilm", ({"technique": "optimize.onnx"},), {"min_cosine": 0.95}),
    DemoJob(
        "MiniLM int8",
        "minilm",
        ({"technique": "quantize.weights", "bits": 8},),
        {"min_cosine": 0.99},
    ),
    DemoJob(
        "SmolLM2 2:4 sparse",
        "smollm2",
        ({"technique": "prune.magnitude", "pattern": "2:4"},),
        _PRUNED,
    ),
    DemoJob("SmolLM2 fewer blocks", "smollm2", (_FEWER_BLOCKS,), _PRUNED),
    DemoJob(
        "SmolLM2 distilled",
        "smollm2",
        (
            _FEWER_BLOCKS,
            {
                "technique": "distill.logits",
                "student": {"source": "previous_step"},
                "max_seconds": 60,
                "sequence_length": 128,
            },
        ),
        _PRUNED,
        trains=True,
    ),
)
NOTES = (
    (
        "Before and after were loaded from disk in processes of their own and measured in turns, on the same text."
        " Quality is perplexity, or for encoders the mean and the least cosine between their embeddings and the original's."
    ),
    (
        f"Quality is measured on {_EVALUATION['tokens']} tokens of the built-in text: enough to tell the jobs apart, too few to"
        " quote. Each report has the confidence interval."
    ),
    (
        "SmolLM2 comes as a GGUF of 98 MB (Q4_1: 4 bits, asymmetric, groups of 32) and is expanded when it is taken in;"
        " `before` is that expanded model. int4 is symmetric here, because on the grid of the GGUF it would look lossless."
    ),
    (
        "The limits that decide the verdict are the demo's own. 2:4 by magnitude ruins a model this small, and a minute of"
        " training on two cores repairs a part of what fewer blocks cost: the table says so."
    ),
)
