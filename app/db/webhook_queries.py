"""Every statement on webhooks: where tenants want to hear of their jobs, and what is to be said there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, select, update
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.tables import Job, WebhookEndpoint, WebhookMessage
from app.ids import new_id

JOB_EVENTS = ("job.running", "job.succeeded", "job.failed", "job.cancelled")
TEST_EVENT = "webhook.test"
_COMPARED = 1000
"""Messages that are due, the longest first, among which those of one endpoint must not crowd out the others'."""


@dataclass(frozen=True)
class Due:
    """A message that was taken for one attempt, and where it goes."""

    id: str
    attempt: int
    """From 1; whoever took the message last has the highest."""
    type: str
    data: dict[str, Any]
    created_at: float
    endpoint_id: str
    url: str
    secret_version: int
    previous_secret_holds: bool


def tell(session: Session, job_id: str, tenant: str, status: dict[str, Any]) -> None:
    """Write down a job's new status for the endpoints that want to hear of it, within the transaction that changed it."""
    event = f"job.{status['status']}"
    if event not in JOB_EVENTS:
        return
    # Held, so that none of them is deleted before its message stands.
    endpoints = session.scalars(
        select(WebhookEndpoint)
        .where(WebhookEndpoint.tenant_id == tenant, WebhookEndpoint.disabled_reason.is_(None))
        .order_by(WebhookEndpoint.id)
        .with_for_update(read=True, key_share=True)
    ).all()
    wanted = [endpoint.id for endpoint in endpoints if event in endpoint.events]
    if not wanted:
        return
    job = session.execute(select(Job.model_id, Job.labels).where(Job.id == job_id)).one()
    data = {"job": job_id, "model": job.model_id, "labels": job.labels, **status}
    for endpoint_id in wanted:
        add_message(session, endpoint_id, tenant, event, data)


def add_message(
    session: Session, endpoint_id: str, tenant: str, event: str, data: dict[str, Any]
) -> WebhookMessage:
    """Insert a message, to be sent at once."""
    message = WebhookMessage(
        id=new_id("msg"), tenant_id=tenant, endpoint_id=endpoint_id, type=event, data=data
    )
    session.add(message)
    session.flush()
    return message


def add_endpoint(session: Session, endpoint: WebhookEndpoint) -> WebhookEndpoint:
    """Insert an endpoint and read it back."""
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint


def get_endpoint(session: Session, endpoint_id: str) -> WebhookEndpoint | None:
    """An endpoint by id."""
    return session.get(WebhookEndpoint, endpoint_id)


def count_endpoints(session: Session) -> int:
    """How many there are."""
    return session.scalar(select(func.count(WebhookEndpoint.id))) or 0


def list_endpoints(session: Session, *, limit: int, after: str | None) -> Sequence[WebhookEndpoint]:
    """Endpoints, newest first, from behind the id `after`."""
    query = select(WebhookEndpoint).order_by(WebhookEndpoint.id.desc()).limit(limit)
    return session.scalars(query if after is None else query.where(WebhookEndpoint.id < after)).all()


def delete_endpoint(session: Session, endpoint_id: str) -> None:
    """Delete an endpoint with its messages."""
    session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id))


def rotate_secret(session: Session, endpoint_id: str, *, previous_holds_seconds: float) -> None:
    """Have the next secret sign from now on, beside the one before for a while."""
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id)
        .values(
            secret_version=WebhookEndpoint.secret_version + 1,
            previous_secret_until=db_now() + previous_holds_seconds,
        )
    )


def set_disabled(session: Session, endpoint_id: str, reason: str | None) -> None:
    """Stop telling an endpoint anything, or start again (`reason` None). What is pending for one that stops is dead."""
    session.execute(
        update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).values(disabled_reason=reason)
    )
    if reason is not None:
        session.execute(
            update(WebhookMessage)
            .where(WebhookMessage.endpoint_id == endpoint_id, WebhookMessage.status == "pending")
            .values(status="dead", ended_at=db_now(), error=reason)
        )


def get_message(session: Session, endpoint_id: str, message_id: str) -> WebhookMessage | None:
    """A message to an endpoint."""
    return session.scalars(
        select(WebhookMessage).where(
            WebhookMessage.id == message_id, WebhookMessage.endpoint_id == endpoint_id
        )
    ).one_or_none()


def list_messages(
    session: Session, endpoint_id: str, *, status: str | None, limit: int, after: str | None
) -> Sequence[WebhookMessage]:
    """Messages to an endpoint, newest first, from behind the id `after`."""
    query = select(WebhookMessage).where(WebhookMessage.endpoint_id == endpoint_id)
    if status is not None:
        query = query.where(WebhookMessage.status == status)
    if after is not None:
        query = query.where(WebhookMessage.id < after)
    return session.scalars(query.order_by(WebhookMessage.id.desc()).limit(limit)).all()


def send_again(session: Session, message_id: str) -> None:
    """Have a message sent now, with all of its attempts before it."""
    session.execute(
        update(WebhookMessage)
        .where(WebhookMessage.id == message_id)
        .values(status="pending", attempts=0, next_attempt_at=db_now(), ended_at=None, error=None)
    )


def is_any_due(session: Session) -> bool:
    """Whether there is anything to take: asked every second, and so without a lock."""
    return bool(session.scalar(select(exists().where(*_due()))))


@dataclass(frozen=True)
class Places:
    """For how many messages there is room."""

    total: int
    each: int
    """Of one endpoint."""
    full: tuple[str, ...]
    """Endpoints with no room at all."""


def take_due(session: Session, places: Places, *, claim_seconds: float) -> list[Due]:
    """Take messages whose time has come for one attempt each. Who dies with one lets it be taken again after the claim."""
    message = WebhookMessage
    # Only so many are compared: of an endpoint with more behind it, the places are soon full.
    longest = (
        select(message.id, message.endpoint_id, message.next_attempt_at)
        .where(*_due(), message.endpoint_id.not_in(places.full))
        .order_by(message.next_attempt_at)
        .limit(_COMPARED)
        .subquery()
    )
    place = func.row_number().over(
        partition_by=longest.c.endpoint_id, order_by=(longest.c.next_attempt_at, longest.c.id)
    )
    placed = select(longest.c.id, longest.c.next_attempt_at, place.label("place")).subquery()
    chosen = (
        select(placed.c.id)
        .where(placed.c.place <= places.each)
        .order_by(placed.c.next_attempt_at)
        .limit(places.total)
        .scalar_subquery()
    )
    taken = session.execute(
        update(WebhookMessage)
        .where(WebhookMessage.id.in_(chosen), *_due())
        .values(attempts=WebhookMessage.attempts + 1, next_attempt_at=db_now() + claim_seconds)
        .returning(WebhookMessage.id)
        .execution_options(synchronize_session=False)
    ).scalars()
    rows = session.execute(
        select(
            WebhookMessage.id,
            WebhookMessage.attempts,
            WebhookMessage.type,
            WebhookMessage.data,
            WebhookMessage.created_at,
            WebhookEndpoint.id,
            WebhookEndpoint.url,
            WebhookEndpoint.secret_version,
            func.coalesce(WebhookEndpoint.previous_secret_until > db_now(), False),
        )
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookMessage.endpoint_id)
        .where(WebhookMessage.id.in_(list(taken)))
    )
    return [Due(*row) for row in rows]


def end_attempt(
    session: Session,
    due: Due,
    *,
    status: str,
    retry_in_seconds: float,
    answer_status: int | None,
    error: str | None,
) -> None:
    """Write down what came of an attempt, unless somebody has taken the message since. One that is dead waits for no other."""
    open_to = ("pending",) if status == "pending" else ("pending", "dead")
    session.execute(
        update(WebhookMessage)
        .where(
            WebhookMessage.id == due.id,
            WebhookMessage.attempts == due.attempt,
            WebhookMessage.status.in_(open_to),
        )
        .values(
            status=status,
            next_attempt_at=db_now() + retry_in_seconds,
            answer_status=answer_status,
            error=error,
            ended_at=None if status == "pending" else db_now(),
        )
    )


def forget_old(session: Session, *, seconds_ago: float) -> None:
    """Delete messages that ended so long ago."""
    session.execute(delete(WebhookMessage).where(WebhookMessage.ended_at < db_now() - seconds_ago))


def _due() -> tuple[ColumnElement[bool], ...]:
    return (WebhookMessage.status == "pending", WebhookMessage.next_attempt_at <= db_now())
