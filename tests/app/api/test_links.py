"""Links in answers can be followed as they are: below the public URL, where there is one, and percent-encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish

from app.access import DEFAULT_TENANT
from app.db.engine import get_database
from app.db.tables import ModelFile
from app.settings import Settings
from app.storage import get_store

PUBLIC = "https://models.example.org/press"


@pytest.fixture
def public(override_settings: Callable[..., Settings]) -> None:
    override_settings(public_url=f"{PUBLIC}/")


def links(value: Any, name: str = "") -> Iterator[str]:
    """Every link in an answer: what is called `url` or `urls`, or what JobResult has instead."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from links(below, name if name == "urls" else key)
    elif isinstance(value, list):
        for below in value:
            yield from links(below, name)
    elif name in ("url", "urls", "download") or (name == "report" and str(value).endswith("/report")):
        yield value


def test_every_link_leads_below_the_public_url(
    public: None, client: TestClient, add_model: Callable[..., str], add_dataset: Callable[..., str]
) -> None:
    model, _ = add_model(), add_dataset()
    job = client.post("/v1/jobs", json={"model": model, "recipe": "int8"}).json()["id"]
    finish(get_database(), claim(get_database(), job), {"model.safetensors": ("model", b"1")})
    made = [
        client.post("/v1/uploads", json={"name": "n", "size": 1}),
        client.post("/v1/keys", json={"name": "k", "role": "reader"}),
        client.post("/v1/webhooks", json={"url": "https://93.184.215.14/"}),
        client.put("/v1/datasets/content", params={"name": "n.txt"}, content=b"text"),
    ]
    for answer in made:
        assert answer.headers["location"].startswith(f"{PUBLIC}/v1/"), answer.url
    shown = [answer.json() for answer in made if "/webhooks" not in str(answer.url)]
    shown += [client.get(f"/v1/{path}").json() for path in ("models", "datasets", "jobs", "keys")]
    shown += [
        client.get(f"/v1/jobs/{job}/result").json(),
        client.get("/v1/webhooks").json()["items"][0]["urls"],
    ]
    found = [link for answer in shown for link in links(answer, "urls" if "messages" in answer else "")]
    assert len(found) >= 25
    assert [link for link in found if link is not None and not link.startswith(f"{PUBLIC}/v1/")] == []


def test_a_file_with_an_odd_name_is_found_by_its_link(
    client: TestClient, add_model: Callable[..., str]
) -> None:
    model, content = add_model(), b"odd"
    get_store().put_stream([content])
    digest = hashlib.sha256(content).hexdigest()
    with get_database().for_tenant(DEFAULT_TENANT).write() as session:
        session.add(ModelFile(model_id=model, path="a b/50% #1?ü.json", sha256=digest, bytes=3))
    urls = {file["path"]: file["url"] for file in client.get(f"/v1/models/{model}").json()["files"]}
    url = urls["a b/50% #1?ü.json"]
    assert url == f"/v1/models/{model}/files/a%20b/50%25%20%231%3F%C3%BC.json"
    assert client.get(url).content == content
