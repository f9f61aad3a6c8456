"""What a database does about those who hold it up."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy import text

from app.db.engine import Database
from app.errors import Unavailable


def test_a_transaction_that_falls_asleep_gives_its_locks_back(
    new_postgres_database: Callable[[], str],
) -> None:
    database = Database(
        new_postgres_database().replace("postgres://", "postgresql+psycopg://"), lease_seconds=0.3
    )
    with database.write() as session:
        session.execute(text("CREATE TABLE rows (id int PRIMARY KEY, value int)"))
        session.execute(text("INSERT INTO rows VALUES (1, 0)"))
    with pytest.raises(Unavailable):
        _sleep_while_another_writes(database)
    with database.read() as session:
        assert session.execute(text("SELECT value FROM rows")).scalar_one() == 2
    database.engine.dispose()


def _sleep_while_another_writes(database: Database) -> None:
    with database.write() as sleeper:
        sleeper.execute(text("UPDATE rows SET value = 1"))
        time.sleep(0.5)
        with database.write() as other:
            other.execute(text("SET LOCAL lock_timeout = '5s'"))
            other.execute(text("UPDATE rows SET value = 2"))
