"""Jobs for image classifiers: what is planned, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.spec.base import Family

AddModel = Callable[..., str]
AddDataset = Callable[..., str]

SET = {"images": 50, "height": 48, "width": 40, "channels": 3, "layout": "NHWC", "largest_label": 4}
VIT, RESNET = "ViTForImageClassification", "ResNetForImageClassification"
GRAPH = "ONNX"
QDQ = {"technique": "quantize.onnx", "method": "qdq"}


@pytest.fixture
def ask(
    client: TestClient, add_model: AddModel, add_dataset: AddDataset
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Submit a step on images of the set; the answer's status, and its faults by place or the job."""

    def submit(
        step: dict[str, Any], architecture: str = RESNET, *, images: dict[str, Any] | None = None, **more: Any
    ) -> tuple[int, dict[str, Any]]:
        source = {"dataset": add_dataset(**(SET | (images or {})))}
        spec = {
            "steps": [step],
            "calibration": source,
            "training": source,
            "evaluation": {"text": source},
        } | more
        model = add_model(Family.IMAGE_CLASSIFIER, architecture=architecture)
        answer = client.post("/v1/jobs", json={"model": model, "spec": spec})
        body = answer.json()
        faults = {fault["pointer"]: fault["detail"] for fault in body.get("errors", ())}
        return answer.status_code, faults or body

    return submit


@pytest.mark.parametrize(
    ("step", "architecture"),
    [
        (QDQ, RESNET),
        (QDQ | {"method": "auto", "ignore": ["stem*"]}, RESNET),
        (QDQ, VIT),
        ({"technique": "quantize.weights", "group_size": 32}, VIT),
        ({"technique": "quantize.calibrated", "bits": 8}, VIT),
        ({"technique": "prune.channels"}, GRAPH),
        ({"technique": "prune.channels", "channels": 0.6, "criterion": "random"}, GRAPH),
    ],
)
def test_what_can_be_done_is_planned(ask: Any, step: dict[str, Any], architecture: str) -> None:
    status, job = ask(step, architecture, acceptance={"max_accuracy_drop": 0.02, "max_kl": 0.1})
    assert status == 202, job


@pytest.mark.parametrize(
    ("step", "architecture", "place", "words"),
    [
        ({"technique": "quantize.gguf"}, VIT, "technique", "causal_lm"),
        ({"technique": "prune.depth"}, VIT, "technique", "For images there are quantize.onnx"),
        ({"technique": "prune.calibrated"}, RESNET, "technique", "image_classifier"),
        ({"technique": "prune.magnitude"}, RESNET, "technique", "image_classifier"),
        ({"technique": "prune.width"}, VIT, "technique", "image_classifier"),
        ({"technique": "quantize.dynamic"}, VIT, "technique", "image_classifier"),
        ({"technique": "distill.logits"}, VIT, "technique", "image_classifier"),
        ({"technique": "optimize.onnx"}, RESNET, "technique", "image_classifier"),
        ({"technique": "quantize.weights"}, RESNET, "technique", "packs linear layers alone"),
        ({"technique": "quantize.calibrated"}, RESNET, "technique", "packs linear layers alone"),
        ({"technique": "quantize.weights", "group_size": 24}, VIT, "group_size", "32 works"),
        ({"technique": "quantize.weights", "include_head": True}, VIT, "include_head", "no head"),
        ({"technique": "quantize.onnx"}, RESNET, "method", "use method qdq"),
        ({"technique": "quantize.onnx", "method": "auto", "bits": 4}, VIT, "method", "use method qdq"),
        (QDQ | {"smoothing": 0.5}, VIT, "smoothing", "leave it out"),
        (QDQ | {"ignore": ["nothing*"]}, RESNET, "ignore/0", "named like"),
        (QDQ | {"ignore": ["*"]}, RESNET, "ignore", "Nothing is left"),
        ({"technique": "prune.channels"}, RESNET, "technique", "networks that came as ONNX"),
        (QDQ, GRAPH, "technique", "for which there is prune.channels"),
        ({"technique": "quantize.weights"}, GRAPH, "technique", "for which there is prune.channels"),
        ({"technique": "prune.depth"}, GRAPH, "technique", "for which there is prune.channels"),
    ],
)
def test_what_makes_no_sense_for_images_is_refused_with_its_reason(
    ask: Any, step: dict[str, Any], architecture: str, place: str, words: str
) -> None:
    status, faults = ask(step, architecture)
    assert status == 422
    assert set(faults) == {f"/spec/steps/0/{place}"}
    assert words in faults[f"/spec/steps/0/{place}"]


@pytest.mark.parametrize(
    ("images", "more", "place"),
    [
        ({"channels": 1}, {}, "/spec/calibration/dataset"),
        ({"largest_label": 5}, {}, "/spec/evaluation/text/dataset"),
        (
            {"largest_label": None},
            {"acceptance": {"max_accuracy_drop": 0.1}},
            "/spec/acceptance/max_accuracy_drop",
        ),
        ({}, {"acceptance": {"min_cosine": 0.1}}, "/spec/acceptance/min_cosine"),
        ({}, {"calibration": {}}, "/spec/calibration/dataset"),
        ({}, {"evaluation": {}}, "/spec/evaluation/text/dataset"),
    ],
)
def test_images_must_fit_the_model(
    ask: Any, images: dict[str, Any], more: dict[str, Any], place: str
) -> None:
    status, faults = ask(QDQ, images=images, **more)
    assert (status, place in faults) == (422, True), faults


def test_images_that_are_not_resized_must_be_large_enough(
    client: TestClient, add_model: AddModel, add_dataset: AddDataset
) -> None:
    crop = {
        "resize": None,
        "resample": "bilinear",
        "crop": (64, 64),
        "scale": 1.0,
        "mean": (0,) * 3,
        "std": (1,) * 3,
    }
    model = add_model(Family.IMAGE_CLASSIFIER, architecture=RESNET, preprocessing=crop)
    source = {"dataset": add_dataset(**SET)}
    spec = {"steps": [QDQ], "calibration": source, "evaluation": {"enabled": False}}
    answer = client.post("/v1/jobs", json={"model": model, "spec": spec}).json()
    assert "smaller than the 64 by 64" in answer["errors"][0]["detail"]


def test_text_and_images_are_not_mixed_up(
    client: TestClient, add_model: AddModel, add_dataset: AddDataset
) -> None:
    def faults(model: str, dataset: str, technique: str) -> list[str]:
        spec = {"steps": [{"technique": technique}], "evaluation": {"text": {"dataset": dataset}}}
        answer = client.post("/v1/jobs", json={"model": model, "spec": spec}).json()
        return [fault["detail"] for fault in answer["errors"]]

    (found,) = faults(add_model(Family.IMAGE_CLASSIFIER), add_dataset(), "quantize.weights")
    assert "holds text" in found
    (found,) = faults(add_model(), add_dataset(**SET), "quantize.weights")
    assert "holds images" in found


def test_recipes_are_for_models_of_text(client: TestClient, add_model: AddModel) -> None:
    answer = client.post(
        "/v1/jobs", json={"model": add_model(Family.IMAGE_CLASSIFIER), "recipe": "int8"}
    ).json()
    assert "causal_lm and encoder" in answer["errors"][0]["detail"]


def test_a_plan_of_images_counts_them_and_not_tokens(
    client: TestClient, add_model: AddModel, add_dataset: AddDataset
) -> None:
    source = {"dataset": add_dataset(**SET)}
    spec = {"steps": [QDQ], "calibration": source, "evaluation": {"text": source, "images": 2000}}
    model = add_model(Family.IMAGE_CLASSIFIER, architecture=RESNET)
    plan = client.post("/v1/plans", json={"model": model, "spec": spec}).json()["plan"]
    baseline = next(stage for stage in plan["stages"] if stage["name"] == "baseline")
    assert baseline["disk_bytes"] == 2000 * 3 * 32 * 32


def test_labels_that_are_trained_on_must_be_among_the_models(ask: Any) -> None:
    status, faults = ask({"technique": "prune.channels"}, GRAPH, images={"largest_label": 5})
    assert (status, set(faults)) == (422, {"/spec/training/dataset", "/spec/evaluation/text/dataset"})


def test_pruning_channels_is_planned_as_training(
    client: TestClient, add_model: AddModel, add_dataset: AddDataset
) -> None:
    source = {"dataset": add_dataset(**SET)}
    model = add_model(Family.IMAGE_CLASSIFIER, architecture=GRAPH)
    plans = []
    for steps in (100, 1000):
        step = {"technique": "prune.channels", "max_steps": steps}
        spec = {"steps": [step], "training": source, "evaluation": {"text": source}}
        plans.append(client.post("/v1/plans", json={"model": model, "spec": spec}).json()["plan"])
    assert plans[1]["seconds"] > plans[0]["seconds"]
    assert plans[0]["output_bytes"] < plans[0]["input_bytes"]
