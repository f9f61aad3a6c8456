"""Every statement on idempotency keys. A key is one tenant's: sessions here are a tenant's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, select, update
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


@dataclass(frozen=True)
class Taken:
    """A key that a call holds; who took it over from that call has another time."""

    key: str
    at: float


def take_key(session: Session, key: str, request_sha256: str, *, stale_seconds: float) -> Taken | None:
    """Take a key nobody has, or one whose call has been in flight so long that its process must have died."""
    new = session.execute(_insert(session, key, request_sha256)).one_or_none()
    if new is not None:
        return Taken(new.key, new.created_at)
    abandoned = (
        update(IdempotencyKey)
        .where(
            IdempotencyKey.key == key,
            IdempotencyKey.request_sha256 == request_sha256,
            IdempotencyKey.status_code.is_(None),
            IdempotencyKey.created_at < db_now() - stale_seconds,
        )
        .values(created_at=db_now())
        .returning(IdempotencyKey.key, IdempotencyKey.created_at)
    )
    taken = session.execute(abandoned).one_or_none()
    return None if taken is None else Taken(taken.key, taken.created_at)


def read_key(session: Session, key: str) -> tuple[str, Answer | None]:
    """The digest of the request a key was used for, and its answer once there is one."""
    row = session.scalars(select(IdempotencyKey).where(IdempotencyKey.key == key)).one_or_none()
    if row is None:
        # Forgotten between two statements: to the caller it is a call that is still being worked on.
        return "", None
    if row.status_code is None:
        return row.request_sha256, None
    return row.request_sha256, Answer(row.status_code, row.headers or {}, row.body or "")


def keep_answer(session: Session, taken: Taken, answer: Answer) -> bool:
    """Write down what the call with this key was answered. False: another call holds the key by now."""
    kept = (
        update(IdempotencyKey)
        .where(*_held(taken))
        .values(status_code=answer.status_code, headers=answer.headers, body=answer.body)
        .returning(IdempotencyKey.key)
    )
    return session.execute(kept).one_or_none() is not None


def forget_key(session: Session, taken: Taken) -> None:
    """Drop the key of a call that failed, unless another call holds it by now."""
    session.execute(delete(IdempotencyKey).where(*_held(taken)))


def delete_old_keys(session: Session, *, older_than_seconds: float) -> None:
    """Drop keys nobody will send again."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < db_now() - older_than_seconds))


def _held(taken: Taken) -> tuple[ColumnElement[bool], ...]:
    return (
        IdempotencyKey.key == taken.key,
        IdempotencyKey.created_at == taken.at,
        IdempotencyKey.status_code.is_(None),
    )


def _insert(session: Session, key: str, request_sha256: str) -> ReturningInsert[str, float]:
    """INSERT … ON CONFLICT DO NOTHING, in the words of the database in use; the other's dialect is never imported."""
    values = {"key": key, "request_sha256": request_sha256, "created_at": db_now()}
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        on_postgresql = postgresql.insert(IdempotencyKey).values(values).on_conflict_do_nothing()
        return on_postgresql.returning(IdempotencyKey.key, IdempotencyKey.created_at)
    from sqlalchemy.dialects import sqlite

    on_sqlite = sqlite.insert(IdempotencyKey).values(values).on_conflict_do_nothing()
    return on_sqlite.returning(IdempotencyKey.key, IdempotencyKey.created_at)
