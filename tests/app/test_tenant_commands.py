"""`modelpress tenants` on the server's own database."""

from __future__ import annotations

from typer.testing import CliRunner

from app.cli import cli
from app.db.engine import Database
from app.db.tables import Tenant

REST = "worker seconds a month: no limit  artifact days: as the service  audit days: as the service"


def test_limits_are_set_shown_and_ended(database: Database) -> None:
    with database.write() as session:
        session.add(Tenant(id="acme"))
    run = CliRunner().invoke
    done = run(cli, ["tenants", "limit", "acme", "--stored-bytes", "1000", "--queued-jobs", "0"])
    assert (done.exit_code, done.stdout) == (
        0,
        f"acme  stored bytes: 1000  queued jobs: 0  running jobs: no limit  {REST}\n",
    )
    listed = run(cli, ["tenants", "list"]).stdout.splitlines()
    assert listed == [
        f"acme  stored bytes: 1000  queued jobs: 0  running jobs: no limit  {REST}",
        f"default  stored bytes: no limit  queued jobs: no limit  running jobs: no limit  {REST}",
    ]
    run(cli, ["tenants", "limit", "acme", "--running-jobs", "5", "--worker-seconds", "3600"])
    with database.read() as session:
        acme = session.get_one(Tenant, "acme")
    assert (acme.max_stored_bytes, acme.max_queued_jobs) == (None, None)
    assert (acme.max_running_jobs, acme.max_worker_seconds) == (5, 3600)


def test_a_retention_is_set_shown_and_ended(database: Database) -> None:
    run = CliRunner().invoke
    done = run(cli, ["tenants", "keep", "default", "--artifact-days", "30", "--audit-days", "0"])
    assert done.stdout.endswith(
        "  worker seconds a month: no limit  artifact days: 30  audit days: for ever\n"
    )
    assert run(cli, ["tenants", "list"]).stdout == done.stdout
    assert run(cli, ["tenants", "keep", "default"]).stdout.endswith(f"  {REST}\n")
    assert run(cli, ["tenants", "keep", "nobody"]).exit_code != 0
