"""Statements that ask how the database is."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session


def database_version(session: Session) -> str | None:
    """The migration the database is at; None before the first."""
    return session.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
