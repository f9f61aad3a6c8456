"""Recipes on datasets of one's own: those of images need them, those of text may have them."""

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


@pytest.fixture
def faults(client: TestClient, add_model: AddModel) -> Callable[..., dict[str, str]]:
    """Faults of a recipe for a model of this architecture, by place; none when it is planned."""

    def ask(architecture: str, recipe: str, datasets: dict[str, str] | None) -> dict[str, str]:
        model = add_model(Family.IMAGE_CLASSIFIER, architecture=architecture)
        body = {"model": model, "recipe": recipe} | ({} if datasets is None else {"datasets": datasets})
        answer = client.post("/v1/plans", json=body)
        assert answer.status_code in (200, 422), answer.text
        return {fault["pointer"]: fault["detail"] for fault in answer.json().get("errors", ())}

    return ask


@pytest.mark.parametrize(
    ("architecture", "recipe", "read"),
    [
        (RESNET, "image-cpu-int8", ["calibration", "evaluation"]),
        (VIT, "image-cpu-int8", ["calibration", "evaluation"]),
        (VIT, "vit-int8", ["evaluation"]),
        (VIT, "vit-int4", ["calibration", "evaluation"]),
    ],
)
def test_a_recipe_of_images_needs_the_sets_that_it_reads(
    faults: Any, add_dataset: AddDataset, architecture: str, recipe: str, read: list[str]
) -> None:
    missing = faults(architecture, recipe, None)
    assert missing.keys() == {f"/datasets/{name}" for name in read}
    assert all("name a dataset of images" in detail for detail in missing.values())
    assert faults(architecture, recipe, {name: add_dataset(**SET) for name in read}) == {}


@pytest.mark.parametrize(
    ("architecture", "recipe", "words"),
    [
        (RESNET, "vit-int8", "packs linear layers alone"),
        (RESNET, "vit-int4", "packs linear layers alone"),
        ("ONNX", "image-cpu-int8", "for which there is prune.channels"),
        (VIT, "int8", "is for causal_lm and encoder models"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_says_why(
    faults: Any, add_dataset: AddDataset, architecture: str, recipe: str, words: str
) -> None:
    source = add_dataset(**SET)
    assert words in faults(architecture, recipe, {"calibration": source, "evaluation": source})["/recipe"]


def test_datasets_of_a_recipe_must_exist_and_fit(faults: Any, add_dataset: AddDataset) -> None:
    found = faults(VIT, "vit-int4", {"calibration": "dst_none", "evaluation": add_dataset()})
    assert "There is no dataset dst_none" in found["/datasets/calibration"]
    assert "holds text" in found["/datasets/evaluation"]


def test_a_recipe_of_text_runs_on_text_of_ones_own(
    client: TestClient, add_model: AddModel, add_dataset: AddDataset
) -> None:
    sources = {name: add_dataset() for name in ("calibration", "training", "evaluation")}
    body = {"model": add_model(max_positions=512), "recipe": "shallow-distilled", "datasets": sources}
    spec = client.post("/v1/jobs", json=body).json()["spec"]
    assert spec["calibration"]["dataset"] == sources["calibration"]
    assert spec["training"]["dataset"] == sources["training"]
    assert spec["evaluation"]["text"]["dataset"] == sources["evaluation"]


def test_a_spec_names_its_datasets_itself(client: TestClient, add_model: AddModel) -> None:
    spec = {"steps": [{"technique": "quantize.weights", "bits": 8}]}
    body = {"model": add_model(), "spec": spec, "datasets": {"evaluation": "dst_1"}}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    assert "datasets are for a recipe" in answer.text
