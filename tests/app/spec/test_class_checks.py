"""Classifiers whose outputs are no distribution over classes: what is not measured or taught right is refused."""

from __future__ import annotations

from typing import Any

import pytest
from job_support import make_facts

from app.spec.base import Family
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec, Evaluation
from app.spec.distill import DistillLogits, StudentFromModel
from app.spec.quantize import QuantizeWeights


def classifier(**changes: Any) -> Any:
    return make_facts(Family.ENCODER, architecture="BertForSequenceClassification", num_labels=3, **changes)


def refused(spec: CompressionSpec, facts: Any, **students: Any) -> set[str]:
    return {fault.pointer for fault in check_spec(spec, facts, students)}


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_several_labels_are_neither_measured_nor_taught_as_classes(problem: str) -> None:
    measured = CompressionSpec(steps=(QuantizeWeights(),))
    unmeasured = measured.model_copy(update={"evaluation": Evaluation(enabled=False)})
    taught = unmeasured.model_copy(update={"steps": (QuantizeWeights(), DistillLogits())})
    facts = classifier(problem_type=problem)
    assert refused(measured, facts) == {"/evaluation/enabled"}
    assert refused(unmeasured, facts) == set()
    assert "/steps/1/technique" in refused(taught, facts)
    assert refused(measured, classifier()) == set()


def test_a_student_of_several_labels_is_taught_no_classes() -> None:
    spec = CompressionSpec(steps=(DistillLogits(student=StudentFromModel(model="mdl_1")),))
    assert refused(spec, classifier(), mdl_1=classifier()) == set()
    assert refused(spec, classifier(), mdl_1=classifier(problem_type="regression")) == {
        "/steps/0/student/model"
    }
