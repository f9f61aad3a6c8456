"""One-command mode: what it starts it keeps alive, and takes with it when it goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from waiting import wait_until

pytestmark = pytest.mark.e2e


class Serve:
    """A running `modelpress serve`."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = directory / "serve.log"
        environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "DATABASE_URL")}
        environment["MODELPRESS_DATA_DIR"] = str(directory / "data")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve", "--port", str(port)],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

    def is_ready(self) -> bool:
        """Whether the API, the broker and a worker are there."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/v1/health/ready").status_code == 200 and bool(
                self.client.get("/v1/workers").json()
            )
        except httpx.TransportError:
            return False

    def family(self) -> list[psutil.Process]:
        """Everything it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, word: str) -> psutil.Process:
        """The child of its own whose command line has that word."""
        children = psutil.Process(self.process.pid).children()
        (found,) = [p for p in children if word in _command_line(p)]
        return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    running = Serve(tmp_path)
    try:
        wait_until(running.is_ready, seconds=60)
        yield running
    finally:
        running.client.close()
        if running.process.poll() is None:
            for process in running.family():
                process.kill()
            running.process.kill()
        running.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_leaves_nothing_running(serve: Serve, number: signal.Signals) -> None:
    family = serve.family()
    serve.process.send_signal(number)
    assert serve.process.wait(timeout=20) in (0, 130, 143)
    assert not [p for p in family if _lives(p)]


def test_killed_it_takes_its_children_along(serve: Serve) -> None:
    family = serve.family()
    assert len(family) >= 3, "broker, worker and its pool"
    serve.process.kill()
    serve.process.wait()
    wait_until(lambda: not [p for p in family if _lives(p)], seconds=5)


@pytest.mark.parametrize("child", ["celery", "valkey-server"])
def test_a_child_that_dies_is_started_again(serve: Serve, child: str) -> None:
    old = serve.child(child)
    old.kill()
    wait_until(lambda: not _lives(old), seconds=5)

    def is_back() -> bool:
        try:
            return serve.child(child).pid != old.pid and serve.is_ready()
        except ValueError:
            return False

    wait_until(is_back, seconds=30)


def test_a_busy_port_is_said_in_words(serve: Serve, tmp_path: Path) -> None:
    port = serve.client.base_url.port
    answer = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", "--port", str(port)],
        env=os.environ | {"MODELPRESS_DATA_DIR": str(tmp_path / "other")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert answer.returncode == 1
    assert str(port) in answer.stderr
    assert "Traceback" not in answer.stderr


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
