"""Quotas of tenants, asked in the transaction that would use something up: two calls at once cannot both take the last of it."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy.orm import Session

from app.db import quota_queries, worker_time
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
    """Raise unless the tenant may queue one job more: TooManyRequests when as many wait as may, QuotaExceeded when the
    month's worker seconds are used up."""
    limits = quota_queries.read_limits(session)
    if limits.worker_seconds is not None:
        _require_worker_seconds(session, limits.worker_seconds)
    if limits.queued_jobs is not None:
        _require_place(session, limits.queued_jobs)


def set_limits(session: Session, tenant: str, limits: quota_queries.Limits) -> Tenant:
    """Set what a tenant may use from now on; what it uses already stays. Raises NotFound."""
    row = require_tenant(session, tenant)
    row.max_stored_bytes, row.max_queued_jobs = limits.stored_bytes, limits.queued_jobs
    row.max_running_jobs, row.max_worker_seconds = limits.running_jobs, limits.worker_seconds
    return row


def require_tenant(session: Session, tenant: str) -> Tenant:
    """A tenant by name. Raises NotFound."""
    row = quota_queries.get_tenant(session, tenant)
    if row is None:
        raise NotFound(f"There is no tenant {tenant}.", hint="`modelpress keys create --tenant` makes one.")
    return row


def _require_worker_seconds(session: Session, limit: int) -> None:
    used, month = worker_time.used_this_month(session)
    if used >= limit:
        again = datetime.fromtimestamp(month.end, UTC)
        raise QuotaExceeded(
            f"{used:.0f} worker seconds have been used this month, of {limit}.",
            code="quota_worker_seconds",
            hint=f"They are counted anew from {again:%Y-%m-%dT%H:%M:%SZ} on: wait until then, {_MORE}",
        )


def _require_place(session: Session, limit: int) -> None:
    quota_queries.lock_usage(session)
    waiting = quota_queries.count_jobs(session, "queued")
    if waiting >= limit:
        raise TooManyRequests(
            f"{waiting} jobs wait, and no more than {limit} may.",
            code="quota_queued_jobs",
            hint=f"Try again when one has started, cancel one, {_MORE}",
        )
