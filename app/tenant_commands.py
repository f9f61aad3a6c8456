"""`modelpress tenants list | limit | keep`: on the server, for whoever may read its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from app.terminal import console

if TYPE_CHECKING:
    from app.db.tables import Tenant

cli = typer.Typer(
    help="Tenants, their quotas and retention, by whoever runs the service.", no_args_is_help=True
)
_AS_SERVICE = "0: for ever [default: as the service's settings say]"


@cli.command("list")
def list_() -> None:
    """List tenants with their limits, and for how long their things are kept."""
    from app.db.engine import get_database
    from app.db.quota_queries import list_tenants

    with get_database().read() as session:
        tenants = list_tenants(session)
    for tenant in tenants:
        _print(tenant)


@cli.command()
def limit(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant.")],
    stored_bytes: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
    queued_jobs: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
    running_jobs: Annotated[int | None, typer.Option(min=0, help="[default: no limit]")] = None,
    worker_seconds: Annotated[int | None, typer.Option(min=0, help="A month. [default: no limit]")] = None,
) -> None:
    """Set what a tenant may use; a limit that is not given ends."""
    from app.db.engine import get_database
    from app.db.quota_queries import Limits
    from app.services.quotas import set_limits

    limits = Limits(stored_bytes, queued_jobs, running_jobs, worker_seconds)
    with get_database().write() as session:
        row = set_limits(session, tenant, limits)
    _print(row)


@cli.command()
def keep(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant.")],
    artifact_days: Annotated[int | None, typer.Option(min=0, max=36_500, help=_AS_SERVICE)] = None,
    audit_days: Annotated[int | None, typer.Option(min=0, max=36_500, help=_AS_SERVICE)] = None,
) -> None:
    """Set for how many days the files of a tenant's results, and its audit log, are kept."""
    from app.db.engine import get_database
    from app.services.retention import set_retention

    with get_database().write() as session:
        row = set_retention(session, tenant, artifact_days=artifact_days, audit_days=audit_days)
    _print(row)


def _print(tenant: Tenant) -> None:
    figures = {
        "stored bytes": _limit(tenant.max_stored_bytes),
        "queued jobs": _limit(tenant.max_queued_jobs),
        "running jobs": _limit(tenant.max_running_jobs),
        "worker seconds a month": _limit(tenant.max_worker_seconds),
        "artifact days": _days(tenant.artifact_retention_days),
        "audit days": _days(tenant.audit_retention_days),
    }
    shown = (f"{name}: {figure}" for name, figure in figures.items())
    console.print(f"{tenant.id}  {'  '.join(shown)}", highlight=False, soft_wrap=True)


def _limit(limit: int | None) -> str:
    return "no limit" if limit is None else str(limit)


def _days(days: int | None) -> str:
    return "as the service" if days is None else str(days or "for ever")
