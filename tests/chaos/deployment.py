"""A deployment under attack: PostgreSQL, Valkey, the API, the sweeper and workers, each a process that can be killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from servers import Broker
from waiting import wait_until

_SKEWED = (
    "import runpy, sys, time; real = time.time; time.time = lambda: real() + {seconds}; "
    "sys.argv[:1] = ['celery']; runpy.run_module('celery', run_name='__main__')"
)


class Deployment:
    """What docker compose runs, on loopback and unix sockets, with short leases so that a storm fits into minutes."""

    def __init__(self, directory: Path, data: Path, postgres: Any, broker: Broker) -> None:
        self.directory, self.data, self.postgres, self.broker = directory, data, postgres, broker
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MODELPRESS_")}
        self.environment = ours | {
            "DATABASE_URL": postgres.get_uri(),
            "REDIS_URL": broker.url,
            "MODELPRESS_DATA_DIR": str(data),
            "MODELPRESS_MIN_FREE_DISK_BYTES": "0",
            "MODELPRESS_LEASE_SECONDS": "5",
            "MODELPRESS_HEARTBEAT_SECONDS": "1",
            "MODELPRESS_SWEEP_SECONDS": "0.5",
            "MODELPRESS_REDISPATCH_SECONDS": "5",
            # A storm kills an attempt every few seconds; that a job gives up after some is tested elsewhere.
            "MODELPRESS_MAX_ATTEMPTS": "1000",
            "MODELPRESS_WORKER_THREADS": "1",
            "MODELPRESS_PART_BYTES": str(8 * 2**20),
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.family: dict[int, psutil.Process] = {}

    def start(self, name: str, *, skew_seconds: int = 0) -> None:
        """Start `api`, `sweeper` or `worker-N`, where it is not running. Returns at once."""
        old = self.running.get(name)
        if old is not None and old.poll() is None:
            return
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self._command(name, skew_seconds),
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """kill -9 of the process alone; what it started must follow by itself."""
        self.members(name)
        self.running[name].kill()
        self.running[name].wait()

    def terminate(self, name: str, *, within_seconds: float) -> None:
        """SIGTERM, as a rolling restart sends it; the process must leave in time."""
        self.members(name)
        self.running[name].terminate()
        self.running[name].wait(timeout=within_seconds)

    def members(self, name: str) -> list[psutil.Process]:
        """The process and all below it; remembered, so that orphans are found at the end."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.running[name].pid)
            found = [main, *main.children(recursive=True)]
            self.family |= {p.pid: p for p in found}
            return found
        return []

    def signal(self, name: str, number: signal.Signals) -> None:
        """A signal to the process and its pool, not to the process group of a job."""
        for process in self.members(name):
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == self.running[name].pid:
                    process.send_signal(number)

    def job_processes(self, name: str) -> list[psutil.Process]:
        """Processes of the job that a worker runs."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            return [p for p in self.members(name) if os.getpgid(p.pid) != self.running[name].pid]
        return []

    def wait_for_api(self) -> None:
        """Until the API answers."""
        wait_until(self._answers, seconds=60)

    def leftovers(self) -> list[psutil.Process]:
        """Processes once seen that still run."""
        return [p for p in self.family.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def stop(self) -> None:
        """End what is left, whatever state it is in."""
        for name, process in self.running.items():
            self.members(name)
            process.kill()
            process.wait()
        for process in self.leftovers():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _command(self, name: str, skew_seconds: int) -> list[str]:
        modelpress = [sys.executable, "-m", "app.cli"]
        if name == "api":
            return [*modelpress, "serve", "--api-only", "--port", str(self.port)]
        if skew_seconds:
            worker = ["--app", "workers.celery_app", "--quiet", "worker", "--queues", "cpu"]
            options = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
            return [sys.executable, "-c", _SKEWED.format(seconds=skew_seconds), *worker, *options]
        return [*modelpress, name.partition("-")[0]]

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v1/health/live", timeout=2).is_success
        except httpx.TransportError:
            return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
