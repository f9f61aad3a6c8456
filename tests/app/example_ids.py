"""Real things in place of those that the examples of the OpenAPI document name, as the docs page puts them there."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient
from job_support import claim, finish
from model_files import INTERMEDIATE, llama_files, llama_shapes, safetensors, safetensors_header, zipped
from reports import measured, report

from app.db.engine import Database

# No name has to be resolved for an address.
WEBHOOK = {"url": "https://93.184.215.14/"}


def example_of(real: str) -> str:
    """The id that examples have where this one would work."""
    return f"{real[:4]}01k0b6x2v9m4c8d7e5f3g1h0j2"


def make_what_examples_name(client: TestClient, database: Database) -> dict[str, str]:
    """An example's id -> a real one, given a model and a job that succeeded. The last artifact is its JSON report."""

    def made(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return dict(client.post(path, json=body).json())

    model = client.put("/v1/models/content", params={"name": "m.zip"}, content=_wide_enough()).json()
    job = made("/v1/jobs", {"model": model["id"], "recipe": "int8"})
    facts = report(measured(4_000, 2.0), measured(2_000, 1.0)).model_dump_json().encode()
    files = {
        "model.safetensors": ("model", b"1"),
        "report.html": ("report_html", b"<html>"),
        "report.json": ("report", facts),
    }
    artifacts = finish(database, claim(database, job["id"]), files)
    key = made("/v1/keys", {"name": "k", "role": "reader"})
    webhook = made("/v1/webhooks", WEBHOOK)
    message = made(webhook["urls"]["test"])
    ids = (model["id"], job["id"], artifacts[-1], key["id"], webhook["id"], message["id"])
    return {example_of(real): real for real in ids}


def _wide_enough() -> bytes:
    """A model whose layers the groups of the examples divide."""
    shapes = {
        name: tuple(64 if size == INTERMEDIATE else size for size in shape)
        for name, shape in llama_shapes(hidden=64).items()
    }
    files = llama_files(hidden_size=64, intermediate_size=64)
    return zipped(files | {"model.safetensors": safetensors(safetensors_header(shapes))})
