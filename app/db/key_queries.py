"""Every statement on tenants and their API keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.tables import ApiKey, Tenant

_LAST_USE_SECONDS = 60
"""How exact `last_used_at` is: a busy key costs one write a minute."""


@dataclass(frozen=True)
class KeyState:
    """What decides whether a key is good."""

    tenant: str
    role: str
    digest: str
    revoked: bool
    expired: bool
    used_lately: bool


def ensure_tenant(session: Session, tenant: str) -> None:
    """Insert a tenant, unless it is there."""
    if not has_tenant(session, tenant):
        session.add(Tenant(id=tenant))


def has_tenant(session: Session, tenant: str) -> bool:
    """Whether there is such a tenant."""
    return session.get(Tenant, tenant) is not None


def add_key(session: Session, key: ApiKey, *, expires_in_seconds: float | None) -> ApiKey:
    """Insert a key that expires after so many seconds of the database's clock, and read it back."""
    key.expires_at = None if expires_in_seconds is None else db_now() + expires_in_seconds
    session.add(key)
    session.flush()
    session.refresh(key)
    return key


def read_key_state(session: Session, key_id: str) -> KeyState | None:
    """What is known of a key, by the database's clock."""
    row = session.execute(
        select(
            ApiKey.tenant_id,
            ApiKey.role,
            ApiKey.digest,
            ApiKey.revoked_at.is_not(None).label("revoked"),
            func.coalesce(ApiKey.expires_at <= db_now(), False).label("expired"),
            func.coalesce(ApiKey.last_used_at > db_now() - _LAST_USE_SECONDS, False).label("used_lately"),
        ).where(ApiKey.id == key_id)
    ).one_or_none()
    return row and KeyState(*row)


def mark_used(session: Session, key_id: str) -> None:
    """Write down that a key was used, unless another process just has."""
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= db_now() - _LAST_USE_SECONDS)
    session.execute(update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=db_now()))


def get_key(session: Session, key_id: str) -> ApiKey | None:
    """A key by id, revoked or not."""
    return session.get(ApiKey, key_id)


def list_keys(session: Session, *, limit: int, after: str | None) -> Sequence[ApiKey]:
    """Keys, newest first, from behind the id `after`; revoked and expired ones too."""
    query = select(ApiKey).order_by(ApiKey.id.desc()).limit(limit)
    return session.scalars(query if after is None else query.where(ApiKey.id < after)).all()


def revoke_key(session: Session, key_id: str) -> None:
    """Make a key useless from now on; the time of the first revocation stays."""
    session.execute(
        update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=db_now())
    )
