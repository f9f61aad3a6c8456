"""A real job where there is no bubblewrap, and a worker that must not run below the level that is asked for.

Every other test with a worker runs its jobs at the strongest level of the machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from service import Service

from app.embedded import worker_command
from workers import sandbox_levels

pytestmark = pytest.mark.e2e

QUANTIZE = {
    "steps": [{"technique": "quantize.weights", "bits": 8}],
    "evaluation": {"tokens": 256, "sequence_length": 64, "latency_rounds": 3},
}
NO_BUBBLEWRAP = {"PATH": "/nonexistent"}


@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)
def test_a_job_runs_under_landlock_and_health_tells_it(
    start_service: Callable[[str], Service], valkey: Any, tmp_path: Path
) -> None:
    from tiny_models import tiny_model

    why = sandbox_levels.probe("landlock", tmp_path / "probe")
    if why is not None:
        pytest.skip(f"NOT TESTED, this machine has no Landlock: {why}")
    service = start_service(valkey.url)
    service.start_worker(**NO_BUBBLEWRAP)
    checks = service.client.get("/v1/health/ready").json()["checks"]
    assert checks["sandbox"]["facts"]["weakest"] == "landlock"
    job_id = service.submit(service.upload(tiny_model("LlamaForCausalLM", tmp_path / "tiny")), spec=QUANTIZE)
    job = service.wait_for(job_id, "succeeded", "failed", seconds=280)
    assert job["status"] == "succeeded", job["error"]


@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)
def test_a_worker_below_the_minimum_does_not_start_and_says_why(
    start_service: Callable[[str], Service], valkey: Any
) -> None:
    service = start_service(valkey.url)
    done = subprocess.run(
        worker_command(service.settings),
        env=os.environ | NO_BUBBLEWRAP | {"MODELPRESS_SANDBOX": "namespaces"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "bubblewrap is not installed" in done.stdout + done.stderr
    assert service.ready_workers() == []
