"""Every statement on idempotency keys. A key is one tenant's: sessions here are a tenant's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert

from app.db.engine import db_now
from app.db.tables import IdempotencyKey


@dataclass(frozen=True)
class Answer:
    """What the first call was answered."""

    status_code: int
    headers: dict[str, Any]
    body: str


def take_key(session: Session, key: str, request_sha256: str, *, stale_seconds: float) -> bool:
    """Take a key nobody has, or one whose call has been in flight so long that its process must have died."""
    if session.execute(_insert(session, key, request_sha256)).one_or_none() is not None:
        return True
    abandoned = (
        update(IdempotencyKey)
        .where(
            IdempotencyKey.key == key,
            IdempotencyKey.request_sha256 == request_sha256,
            IdempotencyKey.status_code.is_(None),
            IdempotencyKey.created_at < db_now() - stale_seconds,
        )
        .values(created_at=db_now())
        .returning(IdempotencyKey.key)
    )
    return session.execute(abandoned).one_or_none() is not None


def read_key(session: Session, key: str) -> tuple[str, Answer | None]:
    """The digest of the request a key was used for, and its answer once there is one."""
    row = session.scalars(select(IdempotencyKey).where(IdempotencyKey.key == key)).one_or_none()
    if row is None:
        # Forgotten between two statements: to the caller it is a call that is still being worked on.
        return "", None
    if row.status_code is None:
        return row.request_sha256, None
    return row.request_sha256, Answer(row.status_code, row.headers or {}, row.body or "")


def keep_answer(session: Session, key: str, answer: Answer) -> None:
    """Write down what the call with this key was answered."""
    session.execute(
        update(IdempotencyKey)
        .where(IdempotencyKey.key == key)
        .values(status_code=answer.status_code, headers=answer.headers, body=answer.body)
    )


def forget_key(session: Session, key: str) -> None:
    """Drop the key of a call that failed; one that has its answer stays."""
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.key == key, IdempotencyKey.status_code.is_(None))
    )


def delete_old_keys(session: Session, *, older_than_seconds: float) -> None:
    """Drop keys nobody will send again."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < db_now() - older_than_seconds))


def _insert(session: Session, key: str, request_sha256: str) -> ReturningInsert[tuple[str]]:
    """INSERT … ON CONFLICT DO NOTHING, in the words of the database in use; the other's dialect is never imported."""
    values = {"key": key, "request_sha256": request_sha256, "created_at": db_now()}
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        on_postgresql = postgresql.insert(IdempotencyKey).values(values).on_conflict_do_nothing()
        return on_postgresql.returning(IdempotencyKey.key)
    from sqlalchemy.dialects import sqlite

    on_sqlite = sqlite.insert(IdempotencyKey).values(values).on_conflict_do_nothing()
    return on_sqlite.returning(IdempotencyKey.key)
