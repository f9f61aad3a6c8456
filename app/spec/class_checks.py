"""Classifiers are measured, and taught, by one class for each text or image: who says otherwise is refused where it counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from app.errors import Fault
from app.spec.compression import CompressionSpec
from app.spec.distill import DistillLogits, StudentFromModel
from app.spec.facts import ModelFacts


def check_classes(
    spec: CompressionSpec, facts: ModelFacts, students: Mapping[str, ModelFacts]
) -> Iterator[Fault]:
    """Measuring and training of models whose outputs are no distribution over classes; `students` by model id."""
    if facts.problem_type is not None:
        why = f"config.json says that the problem_type is {facts.problem_type}, and "
        if spec.evaluation.enabled:
            yield Fault(
                "/evaluation/enabled",
                f"{why}what is measured of classifiers is one class for each: set it to false, and measure the result yourself.",
            )
        for number, step in enumerate(spec.steps):
            if step.needs_training:
                yield Fault(
                    f"/steps/{number}/technique",
                    f"{why}classifiers are trained to give one class: use a technique that does not train.",
                )
    for number, step in enumerate(spec.steps):
        if isinstance(step, DistillLogits) and isinstance(step.student, StudentFromModel):
            student = students.get(step.student.model)
            if student is not None and student.problem_type is not None:
                yield Fault(
                    f"/steps/{number}/student/model",
                    f"The student's config.json says that its problem_type is {student.problem_type}; students are taught one class.",
                )
