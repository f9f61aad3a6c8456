"""Jobs cannot be lost or run twice: real workers are killed, stopped and woken, the broker loses its data."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from service import Service, WorkerProcess
from sqlalchemy import text
from waiting import wait_until

from app.queue import enqueue_job, get_celery

pytestmark = [pytest.mark.e2e, pytest.mark.timed]

Start = Callable[[str], Service]
# What is tested here is the worker's part, and that is the same over either database.
ON_POSTGRESQL = pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
# Few tokens: what is tested is the service, not the figures.
EVALUATION = {"tokens": 256, "sequence_length": 64, "latency_rounds": 3}
QUANTIZE = {"steps": [{"technique": "quantize.weights", "bits": 8}], "evaluation": EVALUATION}


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    from tiny_models import tiny_model

    return tiny_model("LlamaForCausalLM", tmp_path / "tiny")


def test_a_killed_worker_loses_nothing_and_repeats_no_stage(
    start_service: Start, valkey: Any, tiny_llama: Path
) -> None:
    service = start_service(valkey.url)
    worker = service.start_worker()
    job_id = service.submit(service.upload(tiny_llama), spec=QUANTIZE)
    _until_step_is_done(service, job_id)
    worker.kill()
    wait_until(lambda: not worker.alive(), seconds=15)
    service.start_worker()
    job = service.wait_for(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    done = [e["data"]["name"] for e in service.events(job_id) if e["data"].get("status") == "done"]
    assert done == [stage["name"] for stage in job["stages"]], "every stage is committed once, in order"
    _check_clean(service, job_id)


@pytest.mark.parametrize(
    ("any_database", "any_broker"), [("sqlite", "valkey"), ("postgresql", "redis")], indirect=True
)
def test_a_broker_that_dies_with_its_data_costs_a_sweep_and_no_job(
    start_service: Start, any_broker: Any, tiny_llama: Path
) -> None:
    service = start_service(any_broker.url)
    model_id = service.upload(tiny_llama)
    waiting = service.submit(model_id, spec=QUANTIZE)
    any_broker.kill()
    unsent = service.submit(model_id, spec=QUANTIZE)
    any_broker.start()
    worker = service.start_worker()
    for job_id in (waiting, unsent):
        assert service.wait_for(job_id, "succeeded", "failed")["status"] == "succeeded"
        assert service.job(job_id)["attempt"] == 1
        _check_clean(service, job_id)
    assert worker.process.poll() is None


@ON_POSTGRESQL
def test_a_worker_survives_its_broker(start_service: Start, valkey: Any, tiny_llama: Path) -> None:
    service = start_service(valkey.url)
    service.start_worker()
    model_id = service.upload(tiny_llama)
    first = service.submit(model_id, spec=QUANTIZE)
    service.wait_for(first, "running")
    valkey.kill()
    time.sleep(1)
    valkey.start()
    second = service.submit(model_id, spec=QUANTIZE)
    for job_id in (first, second):
        assert service.wait_for(job_id, "succeeded", "failed")["status"] == "succeeded"
        _check_clean(service, job_id)


def test_a_worker_that_slept_past_its_lease_wakes_up_to_nothing(
    start_service: Start, valkey: Any, tiny_llama: Path
) -> None:
    service = start_service(valkey.url)
    sleeper = service.start_worker()
    job_id = service.submit(service.upload(tiny_llama), spec=QUANTIZE)
    _until_step_is_done(service, job_id)
    # SQLite has one lock for all writers, and nobody can take it from a process that stopped while it held it.
    # PostgreSQL can, and is not asked to wait for a good moment.
    with service.database.write() as session:
        if session.get_bind().dialect.name == "sqlite":
            session.execute(text("SELECT 1"))  # takes the lock
        sleeper.send(signal.SIGSTOP)
    service.start_worker()
    assert service.wait_for(job_id, "succeeded", "failed")["status"] == "succeeded"
    before = service.events(job_id)
    jobs_processes = [p for p in sleeper.alive() if not _is_stopped(p)]
    sleeper.send(signal.SIGCONT)
    wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in jobs_processes), seconds=10)
    assert service.events(job_id) == before
    _check_clean(service, job_id)


def test_a_running_job_is_cancelled_within_two_seconds(
    start_service: Start, valkey: Any, tiny_llama: Path
) -> None:
    service = start_service(valkey.url)
    worker = service.start_worker()
    job_id = service.submit(service.upload(tiny_llama), spec=QUANTIZE)
    _until_step_is_done(service, job_id)
    worker.family()
    assert service.client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
    began = time.monotonic()
    job = service.wait_for(job_id, "cancelled", seconds=10)
    assert time.monotonic() - began < 2
    assert job["artifacts"] == []
    idle = {p.pid for p in _pool(worker)}
    wait_until(lambda: {p.pid for p in worker.alive()} <= idle, seconds=3)
    assert service.client.get(f"/v1/jobs/{job_id}/result").status_code == 409


@ON_POSTGRESQL
def test_a_training_that_is_stopped_leaves_its_best_state_and_a_job_that_succeeds(
    start_service: Start, valkey: Any, tiny_llama: Path
) -> None:
    service = start_service(valkey.url)
    service.start_worker()
    step = {"technique": "distill.logits", "max_steps": 1_000_000, "evaluate_every": 5, "patience": 1_000_000}
    spec = {
        "steps": [step | {"batch_size": 2, "sequence_length": 16}],
        "evaluation": {"enabled": False},
    }
    job_id = service.submit(service.upload(tiny_llama), spec=spec)
    wait_until(lambda: _steps_trained(service, job_id) >= 10, seconds=240)
    answer = service.client.post(f"/v1/jobs/{job_id}/cancel", json={"keep_best": True})
    assert answer.json()["status"] == "running"
    job = service.wait_for(job_id, "succeeded", "failed", seconds=240)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    (report,) = service.client.get(f"/v1/jobs/{job_id}/report").json()["steps"]
    assert report["metrics"]["stopped_by"] == "request"
    assert 10 <= report["metrics"]["steps"] < 1_000_000
    assert report["metrics"]["held_out_loss_after"] == min(
        loss for _, loss in report["curves"]["held_out_loss"]
    )
    _check_clean(service, job_id)


def test_the_same_message_twice_runs_a_job_once(start_service: Start, valkey: Any, tiny_llama: Path) -> None:
    service = start_service(valkey.url)
    model_id = service.upload(tiny_llama)
    job_id = service.submit(model_id, spec=QUANTIZE)
    for _ in range(3):
        assert enqueue_job(job_id, "cpu")
    service.start_worker()
    service.start_worker()
    job = service.wait_for(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    time.sleep(1)
    _check_clean(service, job_id)


@ON_POSTGRESQL
def test_a_worker_told_to_leave_gives_its_job_back(
    start_service: Start, valkey: Any, tiny_llama: Path
) -> None:
    service = start_service(valkey.url)
    worker = service.start_worker()
    job_id = service.submit(service.upload(tiny_llama), spec=QUANTIZE)
    _until_step_is_done(service, job_id)
    worker.family()
    began = time.monotonic()
    worker.process.terminate()
    worker.process.wait(timeout=10)
    assert time.monotonic() - began < 10
    assert not worker.alive()
    service.start_worker()
    job = service.wait_for(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 1)


@ON_POSTGRESQL
def test_a_worker_that_hears_no_messages_ends_so_that_another_can_start(
    start_service: Start, valkey: Any, tiny_llama: Path
) -> None:
    service = start_service(valkey.url)
    deaf, model_id = service.start_worker(), service.upload(tiny_llama)
    assert get_celery().control.cancel_consumer("cpu", reply=True, timeout=10)
    job_id = service.submit(model_id, spec=QUANTIZE)
    wait_until(lambda: deaf.process.poll() is not None, seconds=40)
    assert deaf.process.returncode == 1
    service.start_worker()
    job = service.wait_for(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 1)


def _until_step_is_done(service: Service, job_id: str) -> None:
    def step_is_done() -> bool:
        job = service.job(job_id)
        assert job["status"] in ("queued", "running"), job
        return any(s["name"].startswith("step") and s["status"] == "done" for s in job["stages"])

    wait_until(step_is_done, seconds=90)


def _check_clean(service: Service, job_id: str) -> None:
    """It ended once, its artifacts are whole, and nothing of it is left in scratch."""
    ended = [
        e for e in service.events(job_id) if e["data"].get("status") in ("succeeded", "failed", "cancelled")
    ]
    assert len(ended) == 1
    for artifact in service.job(job_id)["artifacts"]:
        content = service.client.get(f"/v1/artifacts/{artifact['id']}/content").content
        assert len(content) == artifact["bytes"]
    wait_until(lambda: not (service.settings.scratch_dir / job_id).exists(), seconds=5)


def _steps_trained(service: Service, job_id: str) -> int:
    said = (str(event["data"].get("message")) for event in service.events(job_id))
    return max(
        (int(found[1]) for message in said if (found := re.search(r"step (\d+) of", message))), default=0
    )


def _is_stopped(process: Any) -> bool:
    return bool(process.status() == "stopped")


def _pool(worker: WorkerProcess) -> list[Any]:
    """The worker and its pool, without the process of a job."""
    return [p for p in worker.family() if "celery" in " ".join(p.cmdline())]
