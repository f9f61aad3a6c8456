"""Text that no database could keep is refused where it is read, by the same words on both databases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi.testclient import TestClient

from app.db.engine import Database

NUL = "a\0b"
URL = "https://93.184.215.14/"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "name of a job": ("/v1/jobs", {"recipe": "int8", "name": NUL}),
    "value of a label": ("/v1/jobs", {"recipe": "int8", "labels": {"team": NUL}}),
    "name of a key": ("/v1/keys", {"name": NUL, "role": "reader"}),
    "description of a webhook": ("/v1/webhooks", {"url": URL, "description": NUL}),
    "name of a model": ("/v1/models", {"upload": "upl_0", "name": NUL}),
    "path in a model": ("/v1/models", {"files": [{"path": NUL, "upload": "upl_0"}]}),
    "uri of a model": ("/v1/models", {"uri": f"file:///{NUL}"}),
    "url of an import": ("/v1/imports", {"url": f"https://example.org/{NUL}"}),
    "url of a webhook": ("/v1/webhooks", {"url": URL + NUL}),
    "name of a dataset": ("/v1/datasets", {"upload": "upl_0", "name": NUL}),
    "name of an upload": ("/v1/uploads", {"name": NUL, "size": 1}),
}


QUERIES = {
    "after": (NUL, "be an id"),
    "model": (NUL, "be an id that starts with mdl_"),
    "label": (f"team:{NUL}", "be written name:value"),
}


def test_a_nul_in_a_body_is_a_fault_with_its_place(
    any_database: Database, client: TestClient, add_model: Callable[..., str]
) -> None:
    model = add_model()
    for what, (path, fields) in BODIES.items():
        answer = client.post(path, json=({"model": model} if path == "/v1/jobs" else {}) | fields)
        assert answer.status_code == 422, what
        (fault,) = answer.json()["errors"]
        assert fault["pointer"], what
        assert fault["detail"].startswith("Must "), what
    assert client.get(f"/v1/models/{model}/files/%00").json()["errors"][0]["parameter"] == "path/path"


def test_a_query_for_what_cannot_be_there_is_a_fault(any_database: Database, client: TestClient) -> None:
    for name, (value, words) in QUERIES.items():
        answer = client.get("/v1/jobs", params={name: value})
        assert answer.status_code == 422, name
        (fault,) = answer.json()["errors"]
        assert fault["parameter"].startswith(f"query/{name}")
        assert fault["detail"].startswith(f"Must {words}; got ")


def test_a_name_of_white_space_alone_is_no_name(client: TestClient) -> None:
    answer = client.post("/v1/keys", json={"name": " \t", "role": "reader"})
    assert answer.status_code == 422
