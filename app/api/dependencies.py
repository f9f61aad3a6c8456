"""What routes are given: settings and database sessions.

A `WriteSession` is committed before the response is sent, so no client hears of a change that was then lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Generic, TypeVar

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from app.access import Principal
from app.db.engine import get_database
from app.settings import Settings, get_settings
from app.spec.documented import Documented

# Together fewer than the pool's 30 connections and the 40 threads: a request that holds the database's lock can
# always get a thread to finish, however many others wait for it.
_MAX_READERS = 14
_MAX_WRITERS = 12


async def caller(request: Request) -> Principal:
    """Whoever makes the call, as `app.api.authentication` has found out."""
    principal: Principal = request.state.principal
    return principal


def read_session() -> Iterator[Session]:
    """A session for queries, closed before the response is sent."""
    with get_database().read() as session:
        yield session


def write_session(request: Request) -> Iterator[Session]:
    """A session that is committed when the route ends well and rolled back when it raises."""
    with get_database().write() as session:
        request.state.write_session = session
        yield session


ReadSession = Annotated[Session, Depends(read_session, scope="function", max_concurrency=_MAX_READERS)]
WriteSession = Annotated[Session, Depends(write_session, scope="function", max_concurrency=_MAX_WRITERS)]
Caller = Annotated[Principal, Depends(caller)]
CurrentSettings = Annotated[Settings, Depends(get_settings)]

Limit = Annotated[int, Query(ge=1, le=200, description="How many to return at most.")]
After = Annotated[
    str | None,
    Query(max_length=64, description="Id of the last item of the page before; leave out for the first page."),
]

Item = TypeVar("Item")


class Page(Documented, Generic[Item]):
    """One page of a list, newest first."""

    items: list[Item]
    has_more: bool
    """Whether there are more behind the last item: ask again with `after` set to its id."""
