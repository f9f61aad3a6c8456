"""No job is lost and none ends twice, whatever dies: dozens of real jobs in a storm of faults.

`make chaos` runs it. MODELPRESS_CHAOS_SEED, MODELPRESS_CHAOS_JOBS and MODELPRESS_CHAOS_SECONDS change the storm; what was done
and what came of it is printed as one JSON line.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from deployment import Deployment
from faults import FAULTS, WORKERS, fill_disk
from servers import migrate, own_postgres
from waiting import wait_until
from workload import Accepted, Workload

from app.db.engine import Database
from app.db.job_queries import TERMINAL
from app.db.model_queries import referenced_blobs
from app.db.tables import Job, JobEvent
from app.storage.local import LocalStore
from app.storage.references import remove_orphans

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("MODELPRESS_CHAOS_SEED", "1"))
JOBS = int(os.environ.get("MODELPRESS_CHAOS_JOBS", "30"))
SECONDS = float(os.environ.get("MODELPRESS_CHAOS_SECONDS", "240"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 MiB that may be filled; an ordinary directory where none can be mounted."""
    directory = tmp_path / "data"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    yield directory
    if mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def deployment(tmp_path: Path, small_disk: Path, valkey: Any) -> Iterator[Deployment]:
    with own_postgres() as postgres:
        migrate(postgres.get_uri().replace("postgresql://", "postgresql+psycopg://"))
        running = Deployment(tmp_path, small_disk, postgres, valkey)
        try:
            yield running
        finally:
            running.stop()
            postgres.ensure_postgres_running()


def test_no_job_is_lost_and_none_ends_twice(deployment: Deployment, small_disk: Path, tmp_path: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "engine"))
    from tiny_models import tiny_model

    for name in ("api", "sweeper", *WORKERS):
        deployment.start(name)
    deployment.wait_for_api()
    model = tiny_model("LlamaForCausalLM", tmp_path / "tiny")
    workload = Workload(deployment.url, model, jobs=JOBS, seed=SEED)
    workload.start()
    injected = _storm(deployment, workload, disk=os.path.ismount(small_disk))
    workload.join()
    assert workload.failure is None, repr(workload.failure)
    accepted = workload.accepted
    _wait_for_all(deployment, accepted)
    found = _examine(deployment, accepted)
    print(json.dumps({"seed": SEED, "faults": injected, "requests": accepted.requests} | found))  # noqa: T201 - the figures of docs/promises.md


def _storm(deployment: Deployment, workload: Workload, *, disk: bool) -> dict[str, int]:
    """One fault after the other, each kind in every round, until time is up and everything was submitted."""
    random = Random(SEED)
    injected: Counter[str] = Counter()
    until = time.monotonic() + SECONDS
    faults = [*FAULTS, fill_disk] if disk else list(FAULTS)
    while time.monotonic() < until and workload.failure is None:
        random.shuffle(faults)
        for fault in faults:
            time.sleep(random.uniform(1, 5))
            if time.monotonic() > until:
                break
            fault(deployment, random)
            injected[fault.__name__] += 1
    for name in ("api", "sweeper", *WORKERS):
        deployment.start(name)
    return dict(injected)


def _wait_for_all(deployment: Deployment, accepted: Accepted) -> None:
    """Every accepted job ends, once the storm is over."""
    deployment.wait_for_api()
    with httpx.Client(base_url=deployment.url, timeout=30) as client:
        for job_id in accepted.jobs:
            wait_until(lambda: _status(client, job_id) in TERMINAL, seconds=1800)  # noqa: B023 - called at once


def _status(client: httpx.Client, job_id: str) -> str | None:
    with suppress(httpx.TransportError):
        answer = client.get(f"/v1/jobs/{job_id}")
        assert answer.status_code != 404, f"{job_id} is lost"
        return str(answer.json().get("status"))
    return None


def _examine(deployment: Deployment, accepted: Accepted) -> dict[str, Any]:
    """Every promise, held against what is there. Returns counts."""
    database = Database(
        deployment.environment["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
    )
    store = LocalStore(deployment.data)
    with database.read() as session:
        jobs = {job.id: job for job in session.query(Job)}
        endings = Counter(
            event.job_id for event in session.query(JobEvent) if event.data.get("status") in TERMINAL
        )
    assert accepted.jobs <= set(jobs)
    assert len(jobs) == len(accepted.jobs), "a repeated submit made a second job"
    assert endings == dict.fromkeys(jobs, 1)
    for job in jobs.values():
        allowed = {"succeeded", "cancelled"} if job.id in accepted.cancelled else {"succeeded"}
        assert job.status in allowed, (job.id, job.status, job.error)
    remove_orphans(database, store, older_than_seconds=0)
    blobs = {blob.sha256 for blob in store.iter_blobs()}
    with database.read() as session:
        assert referenced_blobs(session, blobs) == blobs
    for sha256 in blobs:
        with store.open(sha256) as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
    _check_over_http(deployment, accepted, blobs)
    wait_until(lambda: not list((deployment.data / "scratch").iterdir()), seconds=20)
    for name in list(deployment.running):
        deployment.terminate(name, within_seconds=30)
    assert deployment.leftovers() == []
    database.engine.dispose()
    return {
        "jobs": dict(Counter(job.status for job in jobs.values())),
        "attempts": sum(job.attempt for job in jobs.values()),
        "models": len(accepted.models),
        "blobs": len(blobs),
        "lost": 0,
    }


def _check_over_http(deployment: Deployment, accepted: Accepted, blobs: set[str]) -> None:
    """Models have the bytes that were sent, and results all of their files."""
    with httpx.Client(base_url=deployment.url, timeout=30) as client:
        for model_id, weights in accepted.models.items():
            files = client.get(f"/v1/models/{model_id}").json()["files"]
            assert weights in {file["sha256"] for file in files}
        for job_id in accepted.jobs:
            artifacts = client.get(f"/v1/jobs/{job_id}").json()["artifacts"]
            assert {artifact["sha256"] for artifact in artifacts} <= blobs
