"""`modelpress tenants` on the server's own database."""

from __future__ import annotations

from typer.testing import CliRunner

from app.cli import cli
from app.db.engine import Database
from app.db.tables import Tenant


def test_limits_are_set_shown_and_ended(database: Database) -> None:
    with database.write() as session:
        session.add(Tenant(id="acme"))
    run = CliRunner().invoke
    done = run(cli, ["tenants", "limit", "acme", "--stored-bytes", "1000", "--queued-jobs", "0"])
    assert (done.exit_code, done.stdout) == (
        0,
        "acme  stored bytes: 1000  queued jobs: 0  running jobs: no limit\n",
    )
    listed = run(cli, ["tenants", "list"]).stdout.splitlines()
    assert listed == [
        "acme  stored bytes: 1000  queued jobs: 0  running jobs: no limit",
        "default  stored bytes: no limit  queued jobs: no limit  running jobs: no limit",
    ]
    run(cli, ["tenants", "limit", "acme", "--running-jobs", "5"])
    with database.read() as session:
        acme = session.get_one(Tenant, "acme")
    assert (acme.max_stored_bytes, acme.max_queued_jobs, acme.max_running_jobs) == (None, None, 5)
