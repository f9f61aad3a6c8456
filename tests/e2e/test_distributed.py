"""What docker compose runs, by hand: migrate, API, worker and sweeper as processes of their own, on PostgreSQL and Valkey."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from sqlalchemy import create_engine
from waiting import wait_until

from app.db.tables import Base

pytestmark = pytest.mark.e2e

SPEC = {
    "steps": [{"technique": "quantize.weights", "bits": 8}],
    "evaluation": {"tokens": 256, "sequence_length": 64, "latency_rounds": 3},
}


class Deployment:
    """Processes that share nothing but settings: a database, a broker, and a data directory or a bucket."""

    def __init__(self, directory: Path, database_url: str, redis_url: str) -> None:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MODELPRESS_")}
        self.environment = ours | {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "MODELPRESS_DATA_DIR": str(directory / "data"),
            "MODELPRESS_MIN_FREE_DISK_BYTES": "0",
            "COLUMNS": "200",
        }
        self.directory = directory
        self.on_s3 = False
        self.processes: list[subprocess.Popen[str]] = []

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            _command(*words), env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )

    def keep_in_s3(self, server: S3Server) -> None:
        """Have everything started from now on keep blobs in S3."""
        self.on_s3 = True
        self.environment |= {
            "MODELPRESS_STORE": f"s3://{BUCKET}/distributed",
            "MODELPRESS_S3_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command; its log is a file named after it. With S3, it has a disk of its own."""
        environment = dict(self.environment)
        if self.on_s3:
            environment["MODELPRESS_DATA_DIR"] = str(self.directory / f"data-of-{words[0]}")
        with (self.directory / f"{words[0]}.log").open("w") as log:
            process = subprocess.Popen(
                _command(*words), env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Tell everything to leave, as `docker compose stop` does, and see that it does so well."""
        family = [child for p in self.processes for child in psutil.Process(p.pid).children(recursive=True)]
        for process in reversed(self.processes):
            process.terminate()
        codes = []
        for process in self.processes:
            codes.append(process.wait(timeout=30))
            assert process.stdout is not None
            process.stdout.close()
        assert codes == [0] * len(codes)
        assert psutil.wait_procs(family, timeout=5)[1] == []


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "app.cli", *words]


@pytest.fixture
def deployment(tmp_path: Path, new_postgres_database: Callable[[], str], valkey: Any) -> Iterator[Deployment]:
    url = new_postgres_database()
    engine = create_engine(url)
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.exec_driver_sql("DROP TABLE alembic_version")
    engine.dispose()
    running = Deployment(tmp_path, url.replace("postgresql+psycopg", "postgresql"), valkey.url)
    yield running
    for process in running.processes:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _maps_torch(process: psutil.Process) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_job_goes_through_processes_that_share_only_settings(
    store: str, deployment: Deployment, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from tiny_models import tiny_model

    if store == "s3":
        deployment.keep_in_s3(request.getfixturevalue("s3_server"))
    model = tiny_model("LlamaForCausalLM", tmp_path / "tiny")
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    assert deployment.run("migrate").returncode == 0
    api = deployment.start("serve", "--api-only", "--port", "0")
    assert api.stdout is not None
    url = api.stdout.readline().split()[-1]
    deployment.environment["MODELPRESS_URL"] = url
    deployment.start("sweeper")
    worker = deployment.start("worker")
    wait_until(lambda: deployment.run("healthy", "worker").returncode == 0, seconds=60)

    result = tmp_path / "result"
    done = deployment.run(
        "submit", str(model), "--spec", str(tmp_path / "spec.json"), "--output", str(result)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "before" in done.stdout
    assert (result / "model.safetensors").exists()
    config = json.loads((result / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert store == "local" or not list(tmp_path.rglob("blobs"))

    for process in (api, worker):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert not any(_maps_torch(member) for member in family)
    deployment.stop()
