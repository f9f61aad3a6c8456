"""The round trip with curl, as README has it, word for word, against `modelpress serve`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("curl") is None, reason="README's commands need curl, which is not here"),
]

README = Path(__file__).parents[2] / "README.md"


def readme_commands() -> str:
    """The only shell block of README."""
    (block,) = re.findall(r"```sh\n(.+?)```", README.read_text(), re.DOTALL)
    return str(block)


@pytest.fixture
def service_url(tmp_path: Path) -> Iterator[str]:
    """A service as a reader of README has it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "DATABASE_URL")}
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", "--port", "0"],
        env=environment | {"MODELPRESS_DATA_DIR": str(tmp_path / "data")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.send_signal(signal.SIGINT)


def test_the_round_trip_of_readme_works_word_for_word(service_url: str, tmp_path: Path) -> None:
    from tiny_models import tiny_model

    model = tiny_model("LlamaForCausalLM", tmp_path / "tiny")
    work = tmp_path / "work"
    work.mkdir()
    script = re.sub(r"^URL=\S+", f"URL={service_url}", readme_commands(), count=1, flags=re.MULTILINE)
    script = re.sub(r"^MODEL=\S+", f"MODEL={model}", script, count=1, flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=work, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"status":"succeeded"' in done.stdout
    (result,) = work.glob("job_*")
    assert {"model.safetensors", "config.json"} <= {path.name for path in result.rglob("*")}
    assert "</html>" in (work / "report.html").read_text()
    again, anew = (
        subprocess.run(
            [sys.executable, "-m", "app.cli", "submit", str(model), "--recipe", "int8", "--url", service_url, *more],
            cwd=work, capture_output=True, text=True, check=True, timeout=240,
        ).stdout
        for more in (["--output", "again"], ["--no-cache"])
    )  # fmt: skip
    assert f"{result.name} did the same" in again
    assert (work / "again" / "model.safetensors").is_file()
    assert "did the same" not in anew
