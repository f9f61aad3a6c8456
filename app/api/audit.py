"""The audit log, for administrators."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter
from pydantic import Field

from app.api.dependencies import After, Limit, Page, ReadSession
from app.db import audit
from app.services.job_view import as_time
from app.spec.documented import Documented

router = APIRouter(prefix="/audit", tags=["keys"])


class AuditEntryView(Documented):
    """Something was changed."""

    id: str
    at: datetime
    principal: str = Field(examples=["key_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    """Whose key it was done with, `anonymous`, or `command line`."""
    call: str = Field(examples=["POST /v1/jobs"])
    """Method and path, or the command."""
    address: str | None
    """Where the call came from; behind a proxy, the proxy's."""
    request_id: str | None
    """Also in the log of the service."""


@router.get("", operation_id="list_audit_entries", summary="List what was changed")
def list_audit_entries(session: ReadSession, limit: Limit = 20, after: After = None) -> Page[AuditEntryView]:
    """Every change anybody of the tenant made, newest first. An entry is committed with its change, or not at all."""
    entries = audit.list_entries(session, limit=limit + 1, after=after)
    items = [
        AuditEntryView(
            id=entry.id,
            at=as_time(entry.created_at),
            principal=entry.principal,
            call=entry.call,
            address=entry.address,
            request_id=entry.request_id,
        )
        for entry in entries[:limit]
    ]
    return Page(items=items, has_more=len(entries) > limit)
