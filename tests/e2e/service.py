"""The whole service as processes: real workers, real brokers, real databases, the real engine on tiny models."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from fastapi.testclient import TestClient
from waiting import wait_until

from app.db.engine import Database
from app.embedded import worker_command
from app.settings import Settings


@dataclass
class WorkerProcess:
    """A Celery worker as a deployment runs it, and everything it has started."""

    process: subprocess.Popen[bytes]
    children: list[psutil.Process] = field(default_factory=list)

    def family(self) -> list[psutil.Process]:
        """The worker, its pool, and the processes of its job; remembered, so that orphans are found later."""
        try:
            main = psutil.Process(self.process.pid)
            found = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        self.children += [p for p in found if p not in self.children]
        return found

    def kill(self) -> None:
        """kill -9 of the worker alone; its family must follow by itself."""
        self.family()
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """A signal to the worker and its pool, but not to the job's own process group."""
        for process in self.family():
            # One may end between being listed and being asked.
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == os.getpgid(self.process.pid):
                    process.send_signal(number)

    def alive(self) -> list[psutil.Process]:
        """Who of the family still runs."""
        return [p for p in self.children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@dataclass
class Service:
    """A running service without its HTTP server: the test is the client."""

    client: TestClient
    settings: Settings
    database: Database
    logs: Path
    workers: list[WorkerProcess] = field(default_factory=list)

    def start_worker(self, **environment: str) -> WorkerProcess:
        """Start a worker with more in its environment; it is ready when it announces itself."""
        known = len(self.ready_workers())
        with (self.logs / f"worker-{len(self.workers)}.log").open("wb") as log:
            process = subprocess.Popen(
                worker_command(self.settings),
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | environment,
            )
        self.workers.append(WorkerProcess(process))
        wait_until(lambda: len(self.ready_workers()) > known, seconds=60)
        return self.workers[-1]

    def ready_workers(self) -> list[Any]:
        """Workers as the API lists them."""
        return list(self.client.get("/v1/workers").json())

    def upload(self, directory: Path, name: str = "tiny") -> str:
        """Upload a model directory as a zip; returns its id."""
        answer = self.try_upload(directory, name)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def try_upload(self, directory: Path, name: str = "tiny") -> Any:
        """Upload a model directory as a zip; the answer, whatever it is."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(directory))
        return self.client.put("/v1/models/content", params={"name": name}, content=packed.getvalue())

    def submit(self, model_id: str, **body: object) -> str:
        """Submit a job that is run, whatever ran before; returns its id."""
        answer = self.client.post("/v1/jobs", json={"model": model_id, "use_cache": False, **body})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as the API shows it."""
        return dict(self.client.get(f"/v1/jobs/{job_id}").json())

    def wait_for(self, job_id: str, *statuses: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until the job has one of these statuses."""
        wait_until(lambda: self.job(job_id)["status"] in statuses, seconds=seconds)
        return self.job(job_id)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """All events of a job."""
        return list(self.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["items"])
