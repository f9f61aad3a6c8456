"""One engine a process; short transactions; SQLite and PostgreSQL behave alike."""

from __future__ import annotations

import copy
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import Float

from app.db import tenancy
from app.errors import InvalidRequest, Unavailable
from app.settings import get_settings

_AFTER_COMMIT = "after_commit"


class db_now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock in seconds since the epoch: leases must not depend on a worker's clock."""

    type = Float()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(_element: db_now, _compiler: Any, **_kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgresql_now(_element: db_now, _compiler: Any, **_kw: Any) -> str:
    return "extract(epoch FROM clock_timestamp())::double precision"


class Database:
    """Sessions on one engine. `read` never blocks a writer; `write` commits on leaving, or rolls back.

    Its sessions see the rows of every tenant; those of `for_tenant` see one tenant's alone.
    """

    def __init__(self, url: str, *, lease_seconds: float = 60) -> None:
        self.engine: Engine = create_engine(
            url, json_serializer=lambda v: json.dumps(v, separators=(",", ":")), **_engine_options(url)
        )
        if url.startswith("sqlite"):
            _prepare_sqlite(self.engine)
        else:
            _prepare_postgresql(self.engine, lease_seconds)
            tenancy.prepare_postgresql(self.engine)
        self.writing_engine: Engine = self.engine.execution_options(writing=True)
        self._of_service = self

    def for_tenant(self, tenant: str, **options: Any) -> Database:
        """The same database as one tenant sees it; `app.db.tenancy` says how.

        With `origin` (an `app.db.audit.Origin`) its changes are entered into the audit log.
        """
        bound = copy.copy(self)
        bound.engine = tenancy.bound_to(self.engine, tenant).execution_options(**options)
        bound.writing_engine = tenancy.bound_to(self.writing_engine, tenant).execution_options(**options)
        return bound

    def for_service(self) -> Database:
        """The same database as the service itself sees it, whoever's this one is."""
        return self._of_service

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for queries."""
        with _translated(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits when the block ends well; what was handed to `after_commit` runs then."""
        with _translated(), Session(self.writing_engine, expire_on_commit=False) as session:
            with session.begin():
                yield session
            for action in session.info.pop(_AFTER_COMMIT, []):
                action()


def after_commit(session: Session, action: Callable[[], None]) -> None:
    """Run `action` once the session's transaction is committed; not at all if it is rolled back."""
    session.info.setdefault(_AFTER_COMMIT, []).append(action)


@lru_cache(maxsize=1)
def get_database() -> Database:
    """The database of this process."""
    settings = get_settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return Database(settings.resolved_database_url(), lease_seconds=settings.lease_seconds)


def _engine_options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        # 30 s: a writer waits for another rather than fail; no transaction here takes longer.
        return {"connect_args": {"timeout": 30}}
    # A connection broken by a restart of the server is found before use, not by a user.
    return {"pool_pre_ping": True, "pool_size": 10, "max_overflow": 20}


def _prepare_sqlite(engine: Engine) -> None:
    """WAL and full sync; writers take the lock when they begin, since a later upgrade fails at once under load."""

    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _prepare_postgresql(engine: Engine, lease_seconds: float) -> None:
    """Have the server end transactions that fall asleep: a worker stopped amid one would hold its job's row for ever."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        milliseconds = max(1, int(lease_seconds * 1000))
        connection.execute(f"SET idle_in_transaction_session_timeout = {milliseconds}")
        connection.commit()


@contextmanager
def _translated() -> Iterator[None]:
    """Turn a database that does not answer into an error a client can act on."""
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable(
            "All connections to the database are in use.",
            code="database_busy",
            hint="Try again in a few seconds.",
        ) from error
    except DataError as error:
        raise InvalidRequest(
            "The database cannot store or look for one of these values.",
            hint="Leave out NUL characters, and numbers beyond 64 bits.",
        ) from error
    except DBAPIError as error:
        if not (isinstance(error, OperationalError) or error.connection_invalidated):
            raise
        raise Unavailable(
            "The database does not answer.", code="database_unavailable", hint="Try again in a few seconds."
        ) from error
