"""The audit log: each transaction of a request that changes something writes down, within itself, who did it.

So there is no change without its entry, and no entry of a change that was rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import event, select
from sqlalchemy.orm import ORMExecuteState, Session, UOWTransaction

from app.db.tables import AuditEntry, Base, IdempotencyKey
from app.ids import new_id

_CHANGED = "changed"
_NOT_TOLD = frozenset({AuditEntry, IdempotencyKey})
"""Changes of these alone are bookkeeping."""


@dataclass(frozen=True)
class Origin:
    """Where a change comes from; handed to `Database.for_tenant`."""

    principal: str
    call: str
    """E.g. `DELETE /v1/models/mdl_…`, or a command."""
    address: str | None = None
    request_id: str | None = None


def list_entries(session: Session, *, limit: int, after: str | None) -> Sequence[AuditEntry]:
    """Entries, newest first, from behind the id `after`."""
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    return session.scalars(query if after is None else query.where(AuditEntry.id < after)).all()


@event.listens_for(Session, "do_orm_execute")
def _note_statement(state: ORMExecuteState) -> None:
    changes = state.is_insert or state.is_update or state.is_delete
    if changes and state.bind_mapper is not None and state.bind_mapper.class_ not in _NOT_TOLD:
        state.session.info[_CHANGED] = True


@event.listens_for(Session, "after_flush")
def _note_flush(session: Session, _context: UOWTransaction) -> None:
    changed: list[Base] = [*session.new, *session.dirty, *session.deleted]
    if any(type(row) not in _NOT_TOLD for row in changed):
        session.info[_CHANGED] = True


@event.listens_for(Session, "before_commit")
def _write_down(session: Session) -> None:
    origin: Origin | None = session.get_bind().get_execution_options().get("origin")
    if origin is None:
        return
    session.flush()
    if session.info.pop(_CHANGED, False):
        session.add(AuditEntry(id=new_id("aud"), **vars(origin)))
