"""The catalogue tells all there is, in a form that can be used as it is."""

from __future__ import annotations

from collections.abc import Callable

from fastapi.testclient import TestClient

from app.db import worker_queries
from app.db.engine import Database
from app.spec.compression import STEP_CLASSES
from app.spec.recipes import RECIPES


def test_every_technique_is_listed_with_its_schema(client: TestClient) -> None:
    techniques = {t["name"]: t for t in client.get("/v1/techniques").json()}
    assert len(techniques) == len(STEP_CLASSES)
    quantize = techniques["quantize.weights"]
    assert quantize["produces"] == "compressed-tensors"
    assert quantize["parameters"]["properties"]["bits"]["enum"] == [8, 4, 3, 2]
    assert "share one scale" in quantize["parameters"]["properties"]["group_size"]["description"]
    assert techniques["prune.depth"]["needs_calibration"]
    assert techniques["distill.logits"]["needs_training"]
    assert all(t["summary"] and t["families"] for t in techniques.values())


def test_every_recipe_can_be_posted_as_a_spec(client: TestClient, add_model: Callable[..., str]) -> None:
    recipes = client.get("/v1/recipes").json()
    assert {r["name"] for r in recipes} == set(RECIPES)
    model = add_model(max_positions=512)
    for recipe in recipes:
        if recipe["families"] == ["image_classifier"]:
            continue
        spec = recipe["spec"] | {"acceptance": {}}
        answer = client.post("/v1/plans", json={"model": model, "spec": spec})
        assert answer.status_code == 200, (recipe["name"], answer.text)


def test_every_format_a_technique_produces_is_described(client: TestClient) -> None:
    formats = {f["name"]: f for f in client.get("/v1/formats").json()}
    assert {step.produces for step in STEP_CLASSES} <= set(formats)
    assert formats["onnx"]["techniques"] == ["quantize.onnx", "prune.channels", "optimize.onnx"]


def test_workers_are_listed_while_they_are_seen(any_database: Database, client: TestClient) -> None:
    assert client.get("/v1/workers").json() == []
    with any_database.write() as session:
        worker_queries.announce(
            session, "w1", queues="cpu,gpu", hardware={"memory_bytes": 5}, sandbox="process"
        )
    workers = client.get("/v1/workers").json()
    assert [(w["id"], w["queues"], w["hardware"]) for w in workers] == [
        ("w1", ["cpu", "gpu"], {"memory_bytes": 5})
    ]
