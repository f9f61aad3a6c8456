"""What a tenant uses and may use. Sessions here are a tenant's, but for those that set limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.db.tables import Artifact, Dataset, Job, Model, Tenant, Upload
from app.db.tenancy import tenant_of


@dataclass(frozen=True)
class Limits:
    """What a tenant may use; None: as much as there is."""

    stored_bytes: int | None
    queued_jobs: int | None
    running_jobs: int | None = None
    worker_seconds: int | None = None
    """A month."""


def read_limits(session: Session) -> Limits:
    """The limits of the session's tenant."""
    query = select(
        Tenant.max_stored_bytes, Tenant.max_queued_jobs, Tenant.max_running_jobs, Tenant.max_worker_seconds
    ).where(Tenant.id == tenant_of(session))
    return Limits(*session.execute(query).one())


def lock_usage(session: Session) -> None:
    """Let no other transaction of this kind of the session's tenant go on until this one ends: what is counted stays true."""
    query = select(Tenant.id).where(Tenant.id == tenant_of(session))
    # key_share: rows that refer to the tenant can be added meanwhile.
    session.execute(query.with_for_update(key_share=True)).one()


def count_stored_bytes(session: Session) -> int:
    """Bytes of models, datasets, artifacts that have not expired and announced uploads; a blob that is used twice counts twice."""
    kept = _sum(session, Artifact.bytes, Artifact.expired_at.is_(None))
    return kept + sum(_sum(session, column) for column in (Model.bytes, Dataset.bytes, Upload.size))


def count_jobs(session: Session, status: str) -> int:
    """Jobs with this status."""
    return session.execute(select(func.count()).select_from(Job).where(Job.status == status)).scalar_one()


def list_tenants(session: Session) -> Sequence[Tenant]:
    """All tenants, by name."""
    return session.scalars(select(Tenant).order_by(Tenant.id)).all()


def get_tenant(session: Session, tenant: str) -> Tenant | None:
    """A tenant by name."""
    return session.get(Tenant, tenant)


def _sum(session: Session, column: InstrumentedAttribute[int], *where: ColumnElement[bool]) -> int:
    return int(session.execute(select(func.coalesce(func.sum(column), 0)).where(*where)).scalar_one())
