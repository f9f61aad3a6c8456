"""`modelpress keys create | list | revoke`: on the server, for whoever may read its settings. So the first key is made."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from app.access import DEFAULT_TENANT, Role
from app.settings import get_settings
from app.terminal import console, errors

cli = typer.Typer(help="API keys, by whoever runs the service.", no_args_is_help=True)

_PAGE = 200


@cli.command()
def create(
    name: Annotated[str, typer.Argument(help="Whom or what it is for.")],
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.SUBMITTER,
    days: Annotated[float | None, typer.Option(min=0, help="When it ends.  [default: never]")] = None,
    tenant: Annotated[
        str, typer.Option(help="Whose models and jobs it opens; one that is not there yet is made.")
    ] = DEFAULT_TENANT,
) -> None:
    """Make a key and print it, once. Brings the database to the newest version first."""
    from app.db.audit import Origin
    from app.db.engine import get_database
    from app.db.migrate import migrate
    from app.services import keys

    settings = get_settings()
    keys.server_secret(settings)
    database = get_database()
    migrate()
    with database.write() as session:
        keys.ensure_tenant(session, tenant)
    origin = Origin("command line", "modelpress keys create")
    with database.for_tenant(tenant, origin=origin).write() as session:
        made = keys.create_key(session, settings, name=name, role=role, days=days, created_by="command line")
    errors.print(
        f"{made.row.id} ({role} of {tenant}). Keep the key: it is never shown again.", highlight=False
    )
    console.print(made.token, highlight=False, soft_wrap=True)


@cli.command("list")
def list_() -> None:
    """List the newest keys of all tenants, without their secrets."""
    from app.db.engine import get_database
    from app.services import keys

    with get_database().read() as session:
        found, _ = keys.list_keys(session, limit=_PAGE, after=None)
    for key in found:
        ended = "revoked" if key.revoked_at else f"expires {_day(key.expires_at)}"
        line = f"{key.id}  {key.tenant_id}  {key.role:<13}  {ended:<18}  used {_day(key.last_used_at)}  {key.name}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@cli.command()
def revoke(key_id: Annotated[str, typer.Argument(help="Id of the key: key_…")]) -> None:
    """Make a key useless from the next call on."""
    from app.db.audit import Origin
    from app.db.engine import get_database
    from app.services import keys

    database = get_database()
    with database.read() as session:
        tenant = keys.get_key(session, key_id).tenant_id
    with database.for_tenant(
        tenant, origin=Origin("command line", "modelpress keys revoke")
    ).write() as session:
        keys.revoke_key(session, key_id)
    console.print(f"{key_id} is revoked.", highlight=False)


def _day(seconds: float | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).date().isoformat()
