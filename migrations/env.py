"""Alembic's entry: migrates the database the settings name, or the connection a caller hands in."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, create_engine

from app.db.tables import Base
from app.settings import get_settings


def _run(connection: Connection) -> None:
    # SQLite cannot alter a constraint in place: batch mode copies the table.
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_server_default=False,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    settings = get_settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with create_engine(settings.resolved_database_url()).connect() as own:
        _run(own)
        own.commit()
