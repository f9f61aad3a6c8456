"""For how long results and the audit log are kept, and their end.

An expired file keeps its row, which says when it went. Its blob counts as referred to for a day longer, for downloads
under way; then it goes with the orphans. Reports and metrics stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog
from sqlalchemy.orm import Session

from app.db import model_queries, retention_queries
from app.db.engine import Database
from app.db.retention_queries import Retention
from app.db.tables import Tenant
from app.services.quotas import require_tenant
from app.settings import Settings, get_settings

_log = structlog.get_logger(__name__)
# A batch is one short transaction, and whoever adds a blob waits for it.
_ARTIFACTS_BATCH = 500
_ENTRIES_BATCH = 1000


@dataclass(frozen=True)
class Expired:
    """What was given up."""

    artifacts: int
    audit_entries: int


def expire(database: Database, settings: Settings) -> Expired:
    """Give up what tenants have had for as long as it is kept. For the sweeper; several may run at once."""
    with database.read() as session:
        retentions = retention_queries.list_retentions(session, _of_service(settings))
    expired = Expired(
        sum(_expire_artifacts(database, tenant, kept.artifact_days) for tenant, kept in retentions),
        sum(_delete_audit_entries(database, tenant, kept.audit_days) for tenant, kept in retentions),
    )
    if expired != Expired(0, 0):
        _log.info("expired", **vars(expired))
    return expired


def read_retention(session: Session) -> Retention:
    """What holds for the session's tenant."""
    return retention_queries.read_retention(session, _of_service(get_settings()))


def set_retention(
    session: Session, tenant: str, *, artifact_days: int | None, audit_days: int | None
) -> Tenant:
    """Set for how many days a tenant's things are kept; 0: for ever; None: as the service says. Raises NotFound."""
    row = require_tenant(session, tenant)
    row.artifact_retention_days, row.audit_retention_days = artifact_days, audit_days
    return row


def _of_service(settings: Settings) -> Retention:
    return Retention(settings.artifact_retention_days, settings.audit_retention_days)


def _expire_artifacts(database: Database, tenant: str, days: int) -> int:
    """Mark what is due in batches, from the oldest on; those in use are stepped over once."""
    done, since = 0, 0.0
    while days:
        with database.write() as session:
            model_queries.hold_blobs(session)
            made_at = retention_queries.expire_artifacts(
                session, tenant, days=days, since=since, limit=_ARTIFACTS_BATCH
            )
        done += len(made_at)
        if len(made_at) < _ARTIFACTS_BATCH:
            break
        since = max(made_at)
    return done


def _delete_audit_entries(database: Database, tenant: str, days: int) -> int:
    done = 0
    while days:
        with database.write() as session:
            count = retention_queries.delete_audit_entries(session, tenant, days=days, limit=_ENTRIES_BATCH)
        done += count
        if count < _ENTRIES_BATCH:
            break
    return done
