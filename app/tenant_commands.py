"""`modelpress tenants list | limit`: on the server, for whoever may read its settings."""

from __future__ import annotations

from typing import Annotated

import typer

from app.terminal import console

cli = typer.Typer(help="Tenants and their quotas, by whoever runs the service.", no_args_is_help=True)


@cli.command("list")
def list_() -> None:
    """List tenants with their limits."""
    from app.db.engine import get_database
    from app.db.quota_queries import list_tenants

    with get_database().read() as session:
        tenants = list_tenants(session)
    for tenant in tenants:
        stored, queued = _shown(tenant.max_stored_bytes), _shown(tenant.max_queued_jobs)
        console.print(f"{tenant.id}  stored bytes: {stored}  queued jobs: {queued}", highlight=False)


@cli.command()
def limit(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant.")],
    stored_bytes: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
    queued_jobs: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
) -> None:
    """Set what a tenant may use; a limit that is not given ends."""
    from app.db.engine import get_database
    from app.db.quota_queries import Limits
    from app.services.quotas import set_limits

    with get_database().write() as session:
        set_limits(session, tenant, Limits(stored_bytes, queued_jobs))
    console.print(
        f"{tenant}  stored bytes: {_shown(stored_bytes)}  queued jobs: {_shown(queued_jobs)}", highlight=False
    )


def _shown(limit: int | None) -> str:
    return "no limit" if limit is None else str(limit)
