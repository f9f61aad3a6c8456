"""The service as a process answers nothing that its OpenAPI document does not say, whatever it is asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from example_ids import make_what_examples_name
from fastapi.testclient import TestClient
from key_support import MakeKey, bearer
from servers import Broker
from waiting import wait_until

from app.db.engine import Database
from app.main import create_app
from app.settings import get_settings

pytestmark = pytest.mark.e2e

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
# In the gate each database has its share. Nine tenths of what covers the bodies' fields would be jobs and plans: those come with
# `make fuzz`, and in tests/app/spec/test_wrong_types.py without a service.
GATE = {
    "sqlite": ["--seed=1", "--phases=coverage", "--exclude-operation-id-regex=^create_(job|plan)$"],
    "postgresql": ["--seed=1", "--phases=examples,fuzzing,stateful", "--max-examples=8"],
}
FUZZ_EXAMPLES = int(os.environ.get("MODELPRESS_FUZZ_EXAMPLES", "0")) // 50


class EmptyHub(BaseHTTPRequestHandler):
    """A hub without models: what is to be imported is not there, and no test calls the internet."""

    def do_GET(self) -> None:
        """Say so, as the hub does."""
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing else."""


@pytest.fixture
def hub_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def service(
    any_database: Database,
    valkey: Broker,
    hub_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """URL of `modelpress serve` as a process of its own on the test's database."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.setenv("MODELPRESS_HUB_ENDPOINT", hub_url)
    log = tmp_path / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--api-only", "--port", "0"],
            stdout=output,
            stderr=output,
        )
    wait_until(lambda: process.poll() is not None or "answers at" in log.read_text(), seconds=30)
    found = re.search(r"answers at (\S+)", log.read_text())
    assert found, log.read_text()
    yield found[1]
    process.terminate()
    process.wait(timeout=20)
    # pytest shows it when the test has failed.
    sys.stdout.write(log.read_text())


def with_real_ids(url: str, ids: dict[str, str]) -> str:
    """The document of the service; its examples name what is there, but for calls that would delete it."""
    document = httpx.get(f"{url}/openapi.json").json()
    text = json.dumps(document)
    for made_up, real in ids.items():
        text = text.replace(made_up, real)
    filled = json.loads(text)
    for path, operations in document["paths"].items():
        if "delete" in operations:
            filled["paths"][path]["delete"] = operations["delete"]
    return json.dumps(filled)


def test_every_answer_is_as_documented(
    make_key: MakeKey, any_database: Database, service: str, tmp_path: Path
) -> None:
    key = make_key()
    with TestClient(create_app(get_settings()), headers=bearer(key)) as client:
        ids = make_what_examples_name(client, any_database)
    document = tmp_path / "openapi.json"
    document.write_text(with_real_ids(service, ids))
    run = [f"--max-examples={FUZZ_EXAMPLES}"] if FUZZ_EXAMPLES else GATE[any_database.engine.dialect.name]
    command = [
        SCHEMATHESIS, f"--config-file={CONFIGURATION}", "run", document, f"--url={service}",
        f"--header=Authorization: Bearer {key}", "--no-color", *run,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.search(r"(\d+) generated", done.stdout)
    assert tried is not None, done.stdout
    assert int(tried[1]) > 500
    # It has not revoked its own key on the way.
    assert httpx.get(f"{service}/v1/quota", headers=bearer(key)).status_code == 200
