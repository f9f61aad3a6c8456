"""The whole demo as a process, with tiny models in place of those it would download."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from app.demo.jobs import FIRST, SECOND

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A demo's directory in which both models are there already."""
    from tiny_models import tiny_model

    models = tmp_path / "demo" / "models"
    tiny_model("LlamaForCausalLM", models / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tiny_model("BertModel", models / "all-MiniLM-L6-v2")
    return tmp_path / "demo"


def start(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "demo", "--dir", str(directory)],
        env=os.environ | {"COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_demo_runs_every_job_and_leaves_reports_and_nothing_else(directory: Path) -> None:
    process = start(directory)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    for job in (*FIRST, *SECOND):
        assert f"{job.label}: verify" in output, "progress is told where there is no terminal to draw on"
        assert "</html>" in (directory / "reports" / f"{job.directory}.html").read_text()
        assert any((directory / "results" / job.directory).iterdir())
    assert "Everything that was started is stopped." in output
    assert not (directory / "service").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_stops_what_it_started(directory: Path, number: signal.Signals) -> None:
    process = start(directory)
    log = directory / "service.log"
    wait_until(lambda: log.exists() and "/v1/jobs" in log.read_text(), seconds=60)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3, "service, broker, worker"
    process.send_signal(number)
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "Traceback" not in output
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert not (directory / "service").exists()
