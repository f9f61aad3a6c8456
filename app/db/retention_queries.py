"""What has been kept long enough: the files of results, and the audit log. Sessions here are the service's, but for `read_retention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, delete, exists, not_, or_, select, update
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.tables import Artifact, AuditEntry, Dataset, ModelFile, Tenant
from app.db.tenancy import tenant_of

DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Retention:
    """For how many days things are kept; 0: for ever."""

    artifact_days: int
    audit_days: int


def read_retention(session: Session, service: Retention) -> Retention:
    """That of the session's tenant, where it has none of its own the service's."""
    return _retention(session.get_one(Tenant, tenant_of(session)), service)


def list_retentions(session: Session, service: Retention) -> list[tuple[str, Retention]]:
    """(tenant, its retention) of all tenants."""
    return [(tenant.id, _retention(tenant, service)) for tenant in session.scalars(select(Tenant))]


def expire_artifacts(
    session: Session, tenant: str, *, days: int, since: float, limit: int
) -> Sequence[float]:
    """Mark the oldest files of results, made at `since` or later, that are older than so many days and not in use.

    In use is what a model or dataset of the tenant consists of, and so what its jobs work on. Call it within
    `model_queries.hold_blobs`: nobody makes a model of a file meanwhile. Returns when those it marked were made.
    """
    chosen = due_artifacts(tenant, days=days, since=since, limit=limit)
    return session.scalars(
        update(Artifact)
        .where(Artifact.id.in_(chosen.scalar_subquery()))
        .values(expired_at=db_now())
        .returning(Artifact.created_at)
    ).all()


def due_artifacts(tenant: str, *, days: int, since: float, limit: int) -> Select[str]:
    """Ids of the artifacts that `expire_artifacts` marks: one range of an index."""
    return (
        select(Artifact.id)
        .where(
            Artifact.tenant_id == tenant,
            Artifact.kind == "model",
            Artifact.expired_at.is_(None),
            Artifact.created_at >= since,
            Artifact.created_at < db_now() - days * DAY_SECONDS,
            not_(_is_in_use(tenant)),
        )
        # All nulls, but PostgreSQL takes the order from the index only if its columns are named as they stand there.
        .order_by(Artifact.expired_at, Artifact.created_at)
        .limit(limit)
    )


def delete_audit_entries(session: Session, tenant: str, *, days: int, limit: int) -> int:
    """Delete those of the tenant's first `limit` entries that are older than so many days. Returns how many."""
    first = select(AuditEntry.id).where(AuditEntry.tenant_id == tenant).order_by(AuditEntry.id).limit(limit)
    gone = session.scalars(
        delete(AuditEntry)
        .where(
            AuditEntry.id.in_(first.scalar_subquery()),
            AuditEntry.created_at < db_now() - days * DAY_SECONDS,
        )
        .returning(AuditEntry.id)
    ).all()
    return len(gone)


def _is_in_use(tenant: str) -> ColumnElement[bool]:
    return or_(
        exists().where(ModelFile.sha256 == Artifact.sha256, ModelFile.tenant_id == tenant),
        exists().where(Dataset.sha256 == Artifact.sha256, Dataset.tenant_id == tenant),
    )


def _retention(tenant: Tenant, service: Retention) -> Retention:
    artifact, audit = tenant.artifact_retention_days, tenant.audit_retention_days
    return Retention(
        service.artifact_days if artifact is None else artifact,
        service.audit_days if audit is None else audit,
    )
