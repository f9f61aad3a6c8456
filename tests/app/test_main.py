"""The app starts fast and light, and every route is limited, documented and known."""

from __future__ import annotations

import subprocess
import sys

from fastapi.testclient import TestClient

HEAVY = ("torch", "transformers", "numpy", "workers", "celery", "huggingface_hub", "psycopg", "redis")


def test_importing_the_app_loads_nothing_heavy() -> None:
    code = f"import sys, app.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_answer_carries_a_request_id(client: TestClient) -> None:
    assert client.get("/v1/health/live").headers["x-request-id"]
    assert client.get("/nowhere").headers["x-request-id"]


def test_the_log_of_a_request_is_one_json_object_with_its_id() -> None:
    code = (
        "from app.main import app; from fastapi.testclient import TestClient; "
        "TestClient(app).get('/v1/recipes', headers={'X-Request-Id': 'abc'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import json

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    line = next(line for line in lines if line["event"] == "request")
    assert (line["request_id"], line["path"], line["status"], line["level"]) == (
        "abc",
        "/v1/recipes",
        200,
        "info",
    )
