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
    assert (done.exit_code, done.stdout) == (0, "acme  stored bytes: 1000  queued jobs: 0\n")
    listed = run(cli, ["tenants", "list"]).stdout.splitlines()
    assert listed == [
        "acme  stored bytes: 1000  queued jobs: 0",
        "default  stored bytes: no limit  queued jobs: no limit",
    ]
    run(cli, ["tenants", "limit", "acme", "--queued-jobs", "5"])
    with database.read() as session:
        acme = session.get_one(Tenant, "acme")
    assert (acme.max_stored_bytes, acme.max_queued_jobs) == (None, 5)
