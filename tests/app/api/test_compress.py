"""One form with a file and what to do with it makes a model and a job, or nothing at all."""

from __future__ import annotations

import json
from typing import Any

from fastapi.testclient import TestClient
from model_files import llama_files, zipped

from app.db.engine import Database

ARCHIVE = zipped(llama_files())


def compress(client: TestClient, *, key: str | None = None, file: bytes = ARCHIVE, **fields: str) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/v1/compress", files={"file": ("tiny.zip", file)}, data=fields, headers=headers)


def models(client: TestClient) -> list[dict[str, Any]]:
    return list(client.get("/v1/models").json()["items"])


def test_a_form_starts_a_job_on_its_file(any_database: Database, client: TestClient) -> None:
    answer = compress(client, recipe="int8", name="mine")
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == job["urls"]["self"]
    assert (job["status"], job["name"], job["recipe"]) == ("queued", "mine", "int8")
    assert [model["id"] for model in models(client)] == [job["model"]]


def test_a_spec_comes_as_json(client: TestClient) -> None:
    spec = {"steps": [{"technique": "quantize.weights", "bits": 3}]}
    assert compress(client, spec=json.dumps(spec)).json()["spec"]["steps"][0]["bits"] == 3


def test_a_fault_in_the_spec_is_found_by_its_pointer_before_the_file_is_read(client: TestClient) -> None:
    spec = {"steps": [{"technique": "quantize.weights", "bits": 5}]}
    answer = compress(client, file=b"no model at all", spec=json.dumps(spec))
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["/spec/steps/0/bits"]


def test_a_field_left_empty_is_as_none(client: TestClient) -> None:
    answer = compress(client, recipe="int8", spec="", name="")
    assert (answer.status_code, answer.json()["recipe"], answer.json()["name"]) == (202, "int8", None)


def test_an_unknown_recipe_is_refused_before_the_file_is_read(client: TestClient) -> None:
    files = {"file": ("no-model.zip", b"no zip at all")}
    answer = client.post("/v1/compress", files=files, data={"recipe": "int9"})
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_recipe")


def test_a_file_name_that_uploads_would_not_take_is_refused(client: TestClient) -> None:
    for name in ("../tiny.zip", "n" * 256):
        answer = client.post("/v1/compress", files={"file": (name, ARCHIVE)}, data={"recipe": "int8"})
        assert answer.status_code == 422
        assert [fault["pointer"] for fault in answer.json()["errors"]] == ["/file"]
    assert models(client) == []


def test_a_misspelt_field_is_refused_and_recognised(client: TestClient) -> None:
    answer = compress(client, recipe="int8", nme="mine")
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"pointer": "/nme", "detail": "There is no such field here. Did you mean name?"}
    ]
    assert models(client) == []


def test_a_spec_that_is_no_json_is_refused(client: TestClient) -> None:
    for spec in ("{bits: 4}", "[" * 100_000, "1" * 5_000):
        answer = compress(client, spec=spec)
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body")


def test_a_job_that_does_not_fit_leaves_no_model_behind(client: TestClient) -> None:
    spec = {"steps": [{"technique": "quantize.weights", "group_size": 64}]}
    answer = compress(client, spec=json.dumps(spec))
    assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_for_model")
    assert models(client) == []


def test_a_file_that_is_no_model_is_refused(client: TestClient) -> None:
    answer = compress(client, file=b"no model at all", recipe="int8")
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert models(client) == []


def test_the_same_form_with_the_same_key_is_done_once(client: TestClient) -> None:
    """A client makes up a new boundary each time, so the bytes of the two bodies differ."""
    first, again = compress(client, key="k", recipe="int8"), compress(client, key="k", recipe="int8")
    assert again.json() == first.json()
    assert len(models(client)) == 1
    other = compress(client, key="k", recipe="int4")
    assert other.json()["code"] == "idempotency_mismatch"
