"""The command line as a user meets it: as processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.settings import Settings

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("MODELPRESS_") and name not in ("DATABASE_URL", "REDIS_URL")
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "app.cli", *words]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command with a data directory of its own; keyword arguments are environment variables."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        ours = ENVIRONMENT | {"MODELPRESS_DATA_DIR": str(tmp_path / "data"), "COLUMNS": "200"} | environment
        return subprocess.run(
            command(*words), env=ours, capture_output=True, text=True, check=False, timeout=60
        )

    return run


def test_starting_the_command_line_imports_no_torch_and_no_worker(run: Run) -> None:
    code = "import sys, app.cli; print([m for m in ('torch', 'workers', 'celery', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_service_that_is_not_there_is_said_in_words(run: Run) -> None:
    done = run("status", "job_1", MODELPRESS_URL="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("Nothing answers at http://127.0.0.1:9")
    assert "Traceback" not in done.stderr


def test_a_problem_of_the_service_is_said_in_words(run: Run, server_url: str) -> None:
    done = run("status", "job_1", "--url", server_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("There is no job job_1.\n")


@pytest.mark.parametrize("words", [[], ["--recipe", "int8", "--spec", "x.json"]])
def test_submit_wants_a_recipe_or_a_spec(run: Run, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    words = [str(tmp_path / word) if word == "x.json" else word for word in words]
    done = run("submit", str(tmp_path), *words)
    assert done.returncode == 1
    assert "either --recipe NAME" in done.stderr


def test_a_spec_that_is_no_json_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{'steps': []}")
    done = run("submit", str(tmp_path), "--spec", str(tmp_path / "x.json"))
    assert done.returncode == 1
    assert "x.json is not JSON" in done.stderr


def test_a_setting_that_cannot_be_used_is_named(run: Run) -> None:
    done = run("serve", MODELPRESS_PORT="many")
    assert done.returncode == 1
    assert re.search(r"^port: .*integer", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_a_busy_port_is_told_before_anything_starts(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "is in use" in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("words", [["worker"], ["sweeper"], ["serve", "--api-only", "--port", "0"]])
def test_parts_of_a_deployment_want_a_broker(run: Run, words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 1
    assert "REDIS_URL is not set" in done.stderr


def test_the_first_key_is_made_on_the_server_and_opens_the_api(
    run: Run, override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    settings = override_settings(anonymous=False)
    server_url = request.getfixturevalue("server_url")
    here = {"MODELPRESS_DATA_DIR": str(settings.data_dir)}
    key = run("keys", "create", "first", "--role", "administrator", **here).stdout.strip()
    assert "needs an API key" in run("status", "job_1", "--url", server_url).stderr
    assert "no job job_1" in run("status", "job_1", "--url", server_url, MODELPRESS_API_KEY=key).stderr
    assert "no job job_1" in run("status", "job_1", "--url", server_url, "--key", key).stderr
    listed = run("keys", "list", **here).stdout
    key_id = f"key_{key.split('_')[1]}"
    assert key_id in listed
    assert key.split("_")[2] not in listed
    assert run("keys", "revoke", key_id, **here).returncode == 0
    assert "was revoked" in run("status", "job_1", "--url", server_url, "--key", key).stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "MODELPRESS_ANONYMOUS=false"),
        ({"MODELPRESS_ANONYMOUS": "false"}, "MODELPRESS_SECRET_KEY is not set"),
        ({"MODELPRESS_ANONYMOUS": "false", "MODELPRESS_SECRET_KEY": "short"}, "needs 32 characters or more"),
    ],
)
def test_a_service_for_other_machines_does_not_start_without_keys(
    run: Run, environment: dict[str, str], said: str
) -> None:
    done = run("serve", "--host", "0.0.0.0", "--port", "0", **environment)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_migrate_may_be_repeated(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/own.sqlite3"
    assert [run("migrate", DATABASE_URL=url).returncode for _ in range(2)] == [0, 0]
    with sqlite3.connect(tmp_path / "own.sqlite3") as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    assert {"jobs", "alembic_version"} <= names


def test_health_checks_fail_where_nothing_runs(run: Run) -> None:
    assert run("migrate").returncode == 0
    assert run("healthy", "worker").returncode == 1
    assert run("healthy", "api", MODELPRESS_PORT="9").returncode == 1


@pytest.mark.e2e
def test_serve_says_where_it_is_and_ctrl_c_ends_it_well(run: Run, tmp_path: Path) -> None:
    with subprocess.Popen(
        command("serve", "--port", "0"),
        env=ENVIRONMENT | {"MODELPRESS_DATA_DIR": str(tmp_path / "data")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert run("healthy", "api", MODELPRESS_PORT=url.rsplit(":", 1)[1]).returncode == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("words", [["serve", "--api-only", "--port", "0"], ["worker"]])
def test_nothing_starts_on_a_store_that_is_not_there(run: Run, words: list[str]) -> None:
    done = run(
        *words,
        REDIS_URL="redis://127.0.0.1:9",
        MODELPRESS_STORE="s3://models",
        MODELPRESS_S3_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="any",
        AWS_SECRET_ACCESS_KEY="any",
    )
    assert done.returncode == 1
    assert "The S3 service does not answer" in done.stderr
    assert "MODELPRESS_S3_ENDPOINT_URL" in done.stderr
    assert "Traceback" not in done.stderr
