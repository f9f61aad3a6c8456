"""What routes are given: settings, who is calling, and database sessions that see the caller's tenant alone.

A `WriteSession` is committed before the response is sent, so no client hears of a change that was then lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Generic, TypeVar

import structlog
from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from app.access import Principal
from app.api.texts import ID_PATTERN
from app.db.audit import Origin
from app.db.engine import Database, get_database
from app.services.models import Stores
from app.settings import Settings, get_settings
from app.spec.documented import Documented
from app.storage import get_staging, get_store

# Together fewer than the pool's 30 connections and the 40 threads: a request that holds the database's lock can
# always get a thread to finish, however many others wait for it.
_MAX_READERS = 14
_MAX_WRITERS = 12


async def caller(request: Request) -> Principal:
    """Whoever makes the call, as `app.api.authentication` has found out."""
    principal: Principal = request.state.principal
    return principal


def database_of(request: Request) -> Database:
    """The database as the caller's tenant sees it. No route has another."""
    principal: Principal = request.state.principal
    origin = Origin(
        principal=principal.name,
        call=f"{request.method} {request.url.path}",
        address=request.client and request.client.host,
        request_id=structlog.contextvars.get_contextvars().get("request_id"),
    )
    return get_database().for_tenant(principal.tenant, origin=origin)


async def tenant_database(request: Request) -> Database:
    """`database_of` as a dependency, without a hop to a thread."""
    return database_of(request)


TenantDatabase = Annotated[Database, Depends(tenant_database)]


def read_session(database: TenantDatabase) -> Iterator[Session]:
    """A session for queries, closed before the response is sent."""
    with database.read() as session:
        yield session


def write_session(request: Request, database: TenantDatabase) -> Iterator[Session]:
    """A session that is committed when the route ends well and rolled back when it raises."""
    with database.write() as session:
        request.state.write_session = session
        yield session


ReadSession = Annotated[Session, Depends(read_session, scope="function", max_concurrency=_MAX_READERS)]
WriteSession = Annotated[Session, Depends(write_session, scope="function", max_concurrency=_MAX_WRITERS)]
Caller = Annotated[Principal, Depends(caller)]
CurrentSettings = Annotated[Settings, Depends(get_settings)]


async def stores(database: TenantDatabase, settings: CurrentSettings) -> Stores:
    """Where the caller's rows and bytes go."""
    return Stores(database, get_staging(), get_store(), settings)


CurrentStores = Annotated[Stores, Depends(stores)]

Limit = Annotated[int, Query(ge=1, le=200, description="How many to return at most.")]
After = Annotated[
    str | None,
    Query(
        pattern=ID_PATTERN,
        description="Id of the last item of the page before; leave out for the first page.",
    ),
]

Item = TypeVar("Item")


class Page(Documented, Generic[Item]):
    """One page of a list, newest first."""

    items: list[Item]
    has_more: bool
    """Whether there are more behind the last item: ask again with `after` set to its id."""
