"""Every statement on imports by URL. None of them commits.

Whoever changes an upload and its import does so in this order, as deleting an upload does: no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.tables import Import, Upload


@dataclass(frozen=True)
class Claim:
    """An import that was claimed for one attempt, as it was then."""

    upload_id: str
    fence: int
    tenant: str
    url: str
    total: int | None
    etag: str | None
    bytes: int
    attempt: int
    age_seconds: float
    """Since the first attempt began."""
    reserved: int
    """Bytes of the tenant's quota that are kept for it."""
    sha256: str | None
    """What the file must have, where that is known."""


def add_import(session: Session, upload: Upload, url: str, *, expires_in_seconds: float) -> Import:
    """Insert an upload and its import, which is due at once, and read them back."""
    upload.expires_at = db_now() + expires_in_seconds
    session.add(upload)
    session.flush()
    row = Import(upload_id=upload.id, url=url)
    session.add(row)
    session.flush()
    session.refresh(upload)
    session.refresh(row)
    return row


def get_import(session: Session, upload_id: str) -> Import | None:
    """The import of an upload; None for one whose parts are sent."""
    return session.get(Import, upload_id)


def count_unfinished(session: Session) -> int:
    """How many have not ended."""
    return session.scalar(select(func.count()).select_from(Import).where(Import.due_at.is_not(None))) or 0


def count_by_state(session: Session) -> dict[str, int]:
    """How many run, and how many wait."""
    rows = session.execute(
        select(Import.running, func.count()).where(Import.due_at.is_not(None)).group_by(Import.running)
    )
    found = {bool(row[0]): row[1] for row in rows}
    return {"running": found.get(True, 0), "waiting": found.get(False, 0)}


def list_due(session: Session, *, most_of_a_tenant: int, limit: int) -> Sequence[str]:
    """Uploads whose imports may be claimed: first those of tenants with the fewest running, then those due longest.

    Of a tenant with `most_of_a_tenant` running there is none.
    """
    running = (
        select(Import.tenant_id, func.count().label("number"))
        .where(Import.running, Import.due_at > db_now())
        .group_by(Import.tenant_id)
        .subquery()
    )
    number = func.coalesce(running.c.number, 0)
    query = (
        select(Import.upload_id)
        .outerjoin(running, running.c.tenant_id == Import.tenant_id)
        .where(Import.due_at <= db_now(), number < most_of_a_tenant)
        .order_by(number, Import.due_at)
    )
    return session.scalars(query.limit(limit)).all()


def claim(session: Session, upload_id: str, *, lease_seconds: float) -> Claim | None:
    """Claim an import that is due for one attempt; None: somebody else has."""
    taken = session.execute(
        update(Import)
        .where(Import.upload_id == upload_id, Import.due_at <= db_now())
        .values(
            fence=Import.fence + 1,
            attempt=Import.attempt + 1,
            running=True,
            due_at=db_now() + lease_seconds,
            started_at=func.coalesce(Import.started_at, db_now()),
        )
        .returning(Import.upload_id)
    ).one_or_none()
    if taken is None:
        return None
    row = session.execute(
        select(
            Import.upload_id,
            Import.fence,
            Import.tenant_id,
            Import.url,
            Import.total,
            Import.etag,
            Import.bytes,
            Import.attempt,
            db_now() - Import.started_at,
            Upload.size,
            Upload.sha256,
        )
        .join(Upload, Upload.id == Import.upload_id)
        .where(Import.upload_id == upload_id)
    ).one()
    return Claim(*row)


def change(session: Session, held: Claim, **values: Any) -> bool:
    """Change an import that one holds. False: it is gone, has ended, or somebody else holds it."""
    found = session.execute(
        update(Import)
        .where(Import.upload_id == held.upload_id, Import.fence == held.fence, Import.running)
        .values(**values)
        .returning(Import.upload_id)
    )
    return found.one_or_none() is not None


def keep(session: Session, held: Claim, *, lease_seconds: float, **values: Any) -> bool:
    """Renew the lease of an import that one holds, and change it. False: as of `change`."""
    return change(session, held, due_at=db_now() + lease_seconds, **values)


def give_back(session: Session, held: Claim, *, due_in_seconds: float, **values: Any) -> bool:
    """Let an import be claimed again after so many seconds. False: as of `change`."""
    return change(session, held, running=False, due_at=db_now() + due_in_seconds, **values)


def reserve(session: Session, upload_id: str, size: int) -> bool:
    """Keep so many bytes of the tenant's quota for an upload. False: it is gone."""
    found = session.execute(
        update(Upload)
        .where(Upload.id == upload_id, Upload.status == "importing")
        .values(size=size)
        .returning(Upload.id)
    )
    return found.one_or_none() is not None


def end(
    session: Session, held: Claim, upload: dict[str, Any], *, expires_in_seconds: float, **values: Any
) -> bool:
    """End an import: these are the last values of its upload and of itself. False: as of `change`; then roll back."""
    found = session.execute(
        update(Upload)
        .where(Upload.id == held.upload_id, Upload.status == "importing")
        .values(**upload, expires_at=db_now() + expires_in_seconds)
        .returning(Upload.id)
    )
    if found.one_or_none() is None:
        return False
    return change(session, held, running=False, due_at=None, **values)
