"""Migrations with rows in every table, there and back, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, MetaData, Table, create_engine

from app.db.tables import Base

ROOT = Path(__file__).parents[3]
BEFORE_TENANTS = "0002"
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database before there were tenants."""
    url = f"sqlite:///{tmp_path}/own.sqlite3"
    if request.param == "postgresql":
        url = request.getfixturevalue("new_postgres_database")()
    engine = create_engine(url)
    if request.param == "postgresql":
        go(engine, "downgrade", BEFORE_TENANTS)
    else:
        go(engine, "upgrade", BEFORE_TENANTS)
    yield engine
    engine.dispose()


def go(engine: Engine, direction: str, revision: str) -> None:
    config = Config(toml_file=ROOT / "pyproject.toml")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        getattr(command, direction)(config, revision)


def tables(connection: Connection) -> list[Table]:
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


def add_row(connection: Connection, table: Table, word: str) -> None:
    """A row in which every text is `word`, so that it refers to the row of the same word in its parent's table."""
    values: dict[type, Any] = {str: word, int: 1, float: 1.5, bool: False, dict: {"a": 1}, object: {"a": 1}}
    row = {column.name: values[column.type.python_type] for column in table.columns}
    connection.execute(table.insert().values(row))


def rows(engine: Engine) -> Rows:
    with engine.connect() as connection:
        return {
            table.name: [
                dict(row)
                for row in connection.execute(table.select().order_by(*table.primary_key.columns)).mappings()
            ]
            for table in tables(connection)
        }


def test_rows_go_to_the_default_tenant_and_come_back_as_they_were(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in tables(connection):
            add_row(connection, table, "one")
    before = rows(engine)
    go(engine, "upgrade", "head")
    after = rows(engine)
    columns = {name: found[0].keys() for name, found in before.items()}
    kept = {n: [{c: row[c] for c in known} for row in after[n]] for n, known in columns.items()}
    assert kept == before
    owners = {name: [row.get("tenant_id") for row in found] for name, found in rows(engine).items()}
    assert owners.pop("job_labels") == ["default"]
    assert {name for name, found in owners.items() if found == ["default"]} == before.keys() - {"workers"}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": False})
        assert compare_metadata(context, Base.metadata) == []
    go(engine, "downgrade", BEFORE_TENANTS)
    assert rows(engine) == before


def test_going_back_keeps_the_rows_of_all_tenants_and_no_key_of_theirs(engine: Engine) -> None:
    go(engine, "upgrade", "head")
    with engine.begin() as connection:
        for table in tables(connection):
            add_row(connection, table, "acme")
    go(engine, "downgrade", "0003")
    left = {name: len(found) for name, found in rows(engine).items()}
    assert left.pop("api_keys") == left.pop("idempotency_keys") == 0
    assert set(left.values()) == {1}
    go(engine, "upgrade", "head")
    assert {row["tenant_id"] for row in rows(engine)["jobs"]} == {"default"}


def test_a_deleted_parent_still_takes_its_rows_along(engine: Engine) -> None:
    go(engine, "upgrade", "head")
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        for table in tables(connection):
            add_row(connection, table, "acme")
        connection.exec_driver_sql("DELETE FROM jobs")
        connection.exec_driver_sql("DELETE FROM models")
        connection.exec_driver_sql("DELETE FROM uploads")
    left = {name for name, found in rows(engine).items() if found}
    assert (
        left & {"job_events", "job_labels", "job_stages", "artifacts", "model_files", "upload_parts"} == set()
    )
