"""Quotas of tenants, asked in the transaction that would use something up: two calls at once cannot both take the last of it."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.db import quota_queries
from app.db.tables import Tenant
from app.errors import NotFound, QuotaExceeded, TooManyRequests

_MORE = "or ask whoever runs the service for more (`modelpress tenants limit`)."


def require_storage(session: Session, more_bytes: int) -> None:
    """Raise QuotaExceeded when the tenant may not store so many bytes more."""
    limit = quota_queries.read_limits(session).stored_bytes
    if limit is None:
        return
    quota_queries.lock_usage(session)
    used = quota_queries.count_stored_bytes(session)
    if used + more_bytes > limit:
        raise QuotaExceeded(
            f"{more_bytes} bytes more would be over the quota: {used} of {limit} bytes are used.",
            code="quota_stored_bytes",
            hint=f"Delete models, datasets, jobs or uploads you do not need, {_MORE}",
        )


def require_queue(session: Session) -> None:
    """Raise TooManyRequests when as many jobs of the tenant wait as may."""
    limit = quota_queries.read_limits(session).queued_jobs
    if limit is None:
        return
    quota_queries.lock_usage(session)
    waiting = quota_queries.count_jobs(session, "queued")
    if waiting >= limit:
        raise TooManyRequests(
            f"{waiting} jobs wait, and no more than {limit} may.",
            code="quota_queued_jobs",
            hint=f"Try again when one has started, cancel one, {_MORE}",
        )


def set_limits(session: Session, tenant: str, limits: quota_queries.Limits) -> Tenant:
    """Set what a tenant may use from now on; what it uses already stays. Raises NotFound."""
    row = require_tenant(session, tenant)
    row.max_stored_bytes, row.max_queued_jobs = limits.stored_bytes, limits.queued_jobs
    row.max_running_jobs = limits.running_jobs
    return row


def require_tenant(session: Session, tenant: str) -> Tenant:
    """A tenant by name. Raises NotFound."""
    row = quota_queries.get_tenant(session, tenant)
    if row is None:
        raise NotFound(f"There is no tenant {tenant}.", hint="`modelpress keys create --tenant` makes one.")
    return row
