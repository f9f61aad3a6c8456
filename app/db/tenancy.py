"""Whose rows a session sees: the one place where tenants are kept apart.

A session of `Database.for_tenant` carries its tenant as an execution option, and from there

- every SELECT, UPDATE and DELETE through the mapped classes is narrowed to the tenant's rows, sub-queries too;
- every INSERT is given the tenant, so that no code that makes a row can forget it;
- PostgreSQL is told, and keeps the tenants apart itself (row-level security), should a statement come past this file.

Sessions of the service itself (workers, the sweeper) have no tenant: they see every row, and must say whose a new one is.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Mapped, ORMExecuteState, Session, mapped_column, with_loader_criteria

TENANT_ROLE = "modelpress_tenant"
"""The role of PostgreSQL that is held to the policies; the service's own login owns the tables and is not."""

_OPTION = "tenant"
# Both end with the transaction, so that a connection goes back to the pool as it came.
_BECOME_TENANT = (
    f"SELECT set_config('role', '{TENANT_ROLE}', true), set_config('modelpress.tenant', %s, true)"
)


def tenant_of_statement(context: Any) -> str:
    """The tenant of the session that inserts. A session without one has to name it: a KeyError here is a bug."""
    tenant: str = context.execution_options[_OPTION]
    return tenant


class TenantRow:
    """A row that belongs to one tenant."""

    tenant_id: Mapped[str] = mapped_column(default=tenant_of_statement)


def bound_to(engine: Engine, tenant: str) -> Engine:
    """The same pool of connections, for the sessions of one tenant."""
    return engine.execution_options(**{_OPTION: tenant})


def tenant_of(session: Session) -> str | None:
    """The tenant of a session; None for the service's own."""
    tenant: str | None = session.get_bind().get_execution_options().get(_OPTION)
    return tenant


@event.listens_for(Session, "do_orm_execute")
def _narrow(state: ORMExecuteState) -> None:
    tenant = tenant_of(state.session)
    if tenant is not None and not state.is_insert:
        own = with_loader_criteria(TenantRow, lambda row: row.tenant_id == tenant, include_aliases=True)
        state.statement = state.statement.options(own)


def prepare_postgresql(engine: Engine) -> None:
    """Have every transaction of a tenant begin as the role the policies hold, and end with it."""

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        tenant = connection.get_execution_options().get(_OPTION)
        if tenant is not None:
            connection.exec_driver_sql(_BECOME_TENANT, (tenant,))
