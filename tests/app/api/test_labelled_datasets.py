"""Texts with labels: what is kept of them over HTTP, and which models and jobs they suit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from app.settings import Settings
from app.spec.base import Family
from app.storage import get_store

AddModel = Callable[..., str]
AddDataset = Callable[..., str]
CLASSIFIER = {"architecture": "BertForSequenceClassification", "num_labels": 3}


def lines(*entries: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(entry) for entry in entries).encode()


def labelled(*labels: Any) -> bytes:
    return lines(*({"text": f"text {number}", "label": label} for number, label in enumerate(labels)))


def put(client: TestClient, content: bytes, name: str = "a.jsonl") -> dict[str, Any]:
    answer = client.put("/v1/datasets/content", params={"name": name}, content=content)
    assert answer.status_code == 201, answer.text
    return answer.json()


def kept(dataset: dict[str, Any]) -> tuple[str, list[int]]:
    """What safetensors' own reader makes of the file."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    arrays = load_file(get_store().path_of(dataset["sha256"]))
    assert arrays["labels"].dtype == np.int64
    return arrays["text"].tobytes().decode(), arrays["labels"].tolist()


def test_labels_are_kept_beside_the_text_that_would_be_kept_without(client: TestClient) -> None:
    entries = [
        {"text": "Ünö\n\n  \ntwo", "label": 3},
        {"text": " ", "label": 9},
        {"text": "three", "label": 0},
    ]
    dataset = put(client, lines(*entries))
    assert dataset["texts"] == {"texts": 2, "largest_label": 3, "label_names": None}
    assert (dataset["format"], dataset["images"]) == ("jsonl", None)
    assert kept(dataset) == ("Ünö\ntwo\n\nthree\n", [3, 0])
    assert client.get(dataset["url"]).json() == dataset
    plain = put(client, lines(*({"text": entry["text"]} for entry in entries)))
    assert plain["texts"] is None
    assert get_store().path_of(plain["sha256"]).read_text() == kept(dataset)[0]


def test_names_become_their_places_among_the_sorted_names(client: TestClient) -> None:
    dataset = put(client, labelled("positive", "negative", "neutral", "negative"))
    assert dataset["texts"]["label_names"] == ["negative", "neutral", "positive"]
    assert dataset["texts"]["largest_label"] == 2
    assert kept(dataset)[1] == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (labelled(0, None), "Line 2 of a.jsonl has no label"),
        (labelled(None, 0), "Line 2 of a.jsonl has a label, and the first text has none"),
        (labelled(0, "positive"), "has a name for its label, others have not"),
        (labelled(-1), "the label '-1'"),
        (labelled(True), "the label 'True'"),
        (labelled(0.5), "the label '0.5'"),
        (labelled([1, 2]), "the label '[1, 2]'"),
        (labelled(2**40), "the label"),
        (labelled(""), "the label ''"),
        (labelled("a" * 201), "the label"),
        (labelled("a\nb"), "the label"),
        (lines({"text": "a", "text_pair": "b", "label": 1}), "pairs of texts"),
        (labelled(*(f"name {number}" for number in range(10_001))), "more than 10000 names"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_and_leave_nothing_behind(
    client: TestClient, settings: Settings, content: bytes, words: str
) -> None:
    answer = client.put("/v1/datasets/content", params={"name": "a.jsonl"}, content=content)
    assert (answer.status_code, answer.json()["code"]) == (422, "labels_invalid")
    assert words in answer.json()["detail"]
    assert "label" in answer.json()["hint"]
    assert not list(get_store().iter_blobs())
    assert not [p for p in (settings.data_dir / "staging").rglob("*") if p.is_file()]


@pytest.fixture
def ask(client: TestClient, add_model: AddModel, add_dataset: AddDataset) -> Callable[..., dict[str, str]]:
    """Evaluate a classifier on a set with such labels; faults by place, none when the job is taken."""

    def submit(
        labels: dict[str, Any] | None, *, names: list[str] | None = None, **changes: Any
    ) -> dict[str, str]:
        source = {} if labels is None else {"dataset": add_dataset(**labels)}
        spec = {
            "steps": [{"technique": "quantize.weights", "bits": 8}],
            "evaluation": {"text": source},
            "acceptance": {"max_accuracy_drop": 0.01},
        } | changes
        model = add_model(Family.ENCODER, **CLASSIFIER, label_names=names)
        answer = client.post("/v1/jobs", json={"model": model, "spec": spec})
        assert answer.status_code in (202, 422), answer.text
        return {fault["pointer"]: fault["detail"] for fault in answer.json().get("errors", ())}

    return submit


def a_set(largest: int, names: list[str] | None = None) -> dict[str, Any]:
    return {"texts": 50, "largest_label": largest, "label_names": names}


NAMES = ["POSITIVE", "NEGATIVE", "NEUTRAL"]
EVALUATED, LIMIT = "/spec/evaluation/text/dataset", "/spec/acceptance/max_accuracy_drop"


def test_a_classifier_is_evaluated_on_labels_that_are_its_own(ask: Any) -> None:
    assert ask(a_set(2)) == {}
    assert ask(a_set(1, ["negative", "positive"]), names=NAMES) == {}


@pytest.mark.parametrize(
    ("labels", "names", "place", "words"),
    [
        (a_set(3), None, EVALUATED, "go up to 3; the model has classes 0 to 2"),
        (a_set(0, ["good"]), NAMES, EVALUATED, "no class called 'good'; its id2label calls them 'POSITIVE'"),
        (a_set(0, ["good"]), None, EVALUATED, "no id2label"),
        (a_set(0, ["a"]), ["a", "a", "b"], EVALUATED, "more than one class called 'a'"),
        (a_set(1, ["A", "a"]), ["a", "b", "c"], EVALUATED, "differ in case alone"),
        (None, None, LIMIT, "built-in text has no labels"),
        ({}, None, LIMIT, "has no labels; use min_top1_agreement"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_job(
    ask: Any, labels: dict[str, Any] | None, names: list[str] | None, place: str, words: str
) -> None:
    faults = ask(labels, names=names)
    assert faults.keys() == {place}
    assert words in faults[place]


def test_labels_are_no_hindrance_to_models_that_have_no_classes(
    client: TestClient, add_model: AddModel, add_dataset: AddDataset
) -> None:
    spec = {
        "steps": [{"technique": "quantize.weights", "bits": 8}],
        "evaluation": {"text": {"dataset": add_dataset(**a_set(7))}},
    }
    answer = client.post("/v1/jobs", json={"model": add_model(Family.CAUSAL_LM), "spec": spec})
    assert answer.status_code == 202, answer.text
    limited = spec | {"acceptance": {"max_accuracy_drop": 0.1}}
    answer = client.post("/v1/jobs", json={"model": add_model(Family.CAUSAL_LM), "spec": limited})
    assert "For classifiers" in answer.json()["errors"][0]["detail"]
