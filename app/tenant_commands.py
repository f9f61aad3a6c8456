"""`modelpress tenants list | limit`: on the server, for whoever may read its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from app.terminal import console

if TYPE_CHECKING:
    from app.db.quota_queries import Limits

cli = typer.Typer(help="Tenants and their quotas, by whoever runs the service.", no_args_is_help=True)


@cli.command("list")
def list_() -> None:
    """List tenants with their limits."""
    from app.db.engine import get_database
    from app.db.quota_queries import Limits, list_tenants

    with get_database().read() as session:
        tenants = list_tenants(session)
    for tenant in tenants:
        _print(tenant.id, Limits(tenant.max_stored_bytes, tenant.max_queued_jobs, tenant.max_running_jobs))


@cli.command()
def limit(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant.")],
    stored_bytes: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
    queued_jobs: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
    running_jobs: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
) -> None:
    """Set what a tenant may use; a limit that is not given ends."""
    from app.db.engine import get_database
    from app.db.quota_queries import Limits
    from app.services.quotas import set_limits

    limits = Limits(stored_bytes, queued_jobs, running_jobs)
    with get_database().write() as session:
        set_limits(session, tenant, limits)
    _print(tenant, limits)


def _print(tenant: str, limits: Limits) -> None:
    shown = (f"{name.replace('_', ' ')}: {_shown(limit)}" for name, limit in vars(limits).items())
    console.print(f"{tenant}  {'  '.join(shown)}", highlight=False, soft_wrap=True)


def _shown(limit: int | None) -> str:
    return "no limit" if limit is None else str(limit)
