"""Webhooks: a tenant's own servers are told when jobs start and end."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import ConfigDict, Field, StringConstraints

from app.api.dependencies import After, Caller, CurrentSettings, Limit, Page, ReadSession, WriteSession
from app.api.problems import problem_responses
from app.api.texts import TEXT_PATTERN
from app.db import webhook_queries
from app.db.tables import WebhookEndpoint, WebhookMessage
from app.services import webhooks
from app.services.job_view import as_time, link
from app.spec.documented import Documented

# Not an IdempotentRoute: kept answers would hold secrets.
router = APIRouter(prefix="/webhooks", tags=["webhooks"])

WebhookId = Annotated[str, Path(pattern=r"^whe_[0-9a-z]{1,40}$", description="Id of the webhook.")]
MessageId = Annotated[str, Path(pattern=r"^msg_[0-9a-z]{1,40}$", description="Id of the message.")]
Event = Literal["job.running", "job.succeeded", "job.failed", "job.cancelled"]
MessageStatus = Literal["pending", "delivered", "dead"]


class CreateWebhook(Documented):
    """Where to tell of jobs."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"url": "https://example.org/modelpress", "events": ["job.succeeded", "job.failed"]}]
        },
    )

    url: Annotated[
        str, StringConstraints(min_length=1, max_length=2000, strip_whitespace=True, pattern=TEXT_PATTERN)
    ] = Field(json_schema_extra={"format": "uri"})
    """An http or https URL on the open internet, or in a network that the administrator allows."""
    events: Annotated[list[Event], Field(min_length=1, max_length=10)] = Field(
        default=["job.succeeded", "job.failed", "job.cancelled"]
    )
    """What to tell it of."""
    description: Annotated[str, StringConstraints(max_length=200, pattern=TEXT_PATTERN)] = ""
    """For people."""


class Webhook(Documented):
    """Where jobs are told of."""

    id: str = Field(examples=["whe_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    url: str = Field(examples=["https://example.org/modelpress"])
    events: list[str]
    description: str
    disabled_reason: str | None
    """Why nothing is sent any more; null: it is sent. An answer of 410 Gone disables a webhook."""
    previous_secret_until: datetime | None
    """Until then messages carry a signature with the secret before as well."""
    created_at: datetime
    urls: dict[str, str]


class WebhookWithSecret(Webhook):
    """A webhook whose secret has just been made."""

    secret: str = Field(examples=["whsec_…"])
    """What messages are signed with (HMAC-SHA256, Standard Webhooks). It is never shown again; rotate it for another."""


class Message(Documented):
    """Something a webhook is or was told."""

    id: str = Field(examples=["msg_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    """Also the header `webhook-id` and the event's `id`: the same in each attempt. Use it to drop what came twice."""
    type: str = Field(examples=["job.succeeded"])
    data: dict[str, Any]
    status: MessageStatus
    """`dead`: not delivered within three days, or the webhook was disabled."""
    attempts: int
    next_attempt_at: datetime | None
    answer_status: int | None
    """The HTTP status of the last answer; null: there was none."""
    error: str | None
    """Why the last attempt failed: the start of the answer, or what kept it from coming."""
    created_at: datetime
    ended_at: datetime | None


@router.post(
    "",
    operation_id="create_webhook",
    status_code=201,
    summary="Make a webhook",
    responses=problem_responses(409),
)
def create_webhook(
    body: CreateWebhook, session: WriteSession, settings: CurrentSettings, response: Response
) -> WebhookWithSecret:
    """Be told of jobs by a POST to your server, signed by Standard Webhooks, as a CloudEvent in JSON.

    Answer with 2xx within 15 seconds. Anything else is tried again, ten times over three days; 410 ends it. Redirects are not
    followed. A message may come twice: drop what has a `webhook-id` that you have seen. The answer to this call is the
    only place where the secret is seen.
    """
    made = webhooks.create_endpoint(
        session, settings, url=body.url, events=list(body.events), description=body.description
    )
    shown = _with_secret(made, response)
    response.headers["Location"] = shown.urls["self"]
    return shown


@router.get("", operation_id="list_webhooks", summary="List webhooks")
def list_webhooks(session: ReadSession, limit: Limit = 20, after: After = None) -> Page[Webhook]:
    """Webhooks, newest first."""
    found = webhook_queries.list_endpoints(session, limit=limit + 1, after=after)
    return Page(items=[_shown(endpoint) for endpoint in found[:limit]], has_more=len(found) > limit)


@router.get(
    "/{webhook_id}", operation_id="get_webhook", summary="See a webhook", responses=problem_responses(404)
)
def get_webhook(webhook_id: WebhookId, session: ReadSession) -> Webhook:
    """A webhook, without its secret."""
    return _shown(webhooks.get_endpoint(session, webhook_id))


@router.delete(
    "/{webhook_id}",
    operation_id="delete_webhook",
    status_code=204,
    summary="Delete a webhook",
    responses=problem_responses(404),
)
def delete_webhook(webhook_id: WebhookId, session: WriteSession) -> None:
    """Send nothing there any more; what is pending is dropped."""
    webhooks.delete_endpoint(session, webhook_id)


@router.post(
    "/{webhook_id}/rotate-secret",
    operation_id="rotate_webhook_secret",
    summary="Rotate the secret",
    responses=problem_responses(404),
)
def rotate_webhook_secret(
    webhook_id: WebhookId, session: WriteSession, settings: CurrentSettings, response: Response
) -> WebhookWithSecret:
    """Make another secret. For 24 hours messages carry signatures with both, so that none is refused meanwhile."""
    return _with_secret(webhooks.rotate_secret(session, settings, webhook_id), response)


@router.post(
    "/{webhook_id}/enable",
    operation_id="enable_webhook",
    summary="Enable a webhook",
    responses=problem_responses(404),
)
def enable_webhook(webhook_id: WebhookId, session: WriteSession) -> Webhook:
    """Tell a webhook that was disabled of what happens from now on."""
    return _shown(webhooks.enable_endpoint(session, webhook_id))


@router.post(
    "/{webhook_id}/test",
    operation_id="test_webhook",
    status_code=202,
    summary="Send a test",
    responses=problem_responses(404),
)
def test_webhook(webhook_id: WebhookId, session: WriteSession, caller: Caller) -> Message:
    """Send a message of type `webhook.test`; see in the messages what came of it."""
    return _message(webhooks.send_test(session, webhook_id, caller))


@router.get(
    "/{webhook_id}/messages",
    operation_id="list_webhook_messages",
    summary="List messages",
    responses=problem_responses(404),
)
def list_webhook_messages(
    webhook_id: WebhookId,
    session: ReadSession,
    status: Annotated[MessageStatus | None, Query(description="Only those with this status.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> Page[Message]:
    """What a webhook was told, newest first, and how it answered. Kept for 30 days after the end."""
    webhooks.get_endpoint(session, webhook_id)
    found = webhook_queries.list_messages(session, webhook_id, status=status, limit=limit + 1, after=after)
    return Page(items=[_message(message) for message in found[:limit]], has_more=len(found) > limit)


@router.post(
    "/{webhook_id}/messages/{message_id}/replay",
    operation_id="replay_webhook_message",
    status_code=202,
    summary="Send a message again",
    responses=problem_responses(404, 409),
)
def replay_webhook_message(webhook_id: WebhookId, message_id: MessageId, session: WriteSession) -> Message:
    """Send a message again, under the same id, whether it was delivered, is dead or waits."""
    return _message(webhooks.replay(session, webhook_id, message_id))


def _shown(endpoint: WebhookEndpoint) -> Webhook:
    url = link(f"/webhooks/{endpoint.id}")
    return Webhook(
        id=endpoint.id,
        url=endpoint.url,
        events=endpoint.events,
        description=endpoint.description,
        disabled_reason=endpoint.disabled_reason,
        previous_secret_until=endpoint.previous_secret_until and as_time(endpoint.previous_secret_until),
        created_at=as_time(endpoint.created_at),
        urls={"self": url, "messages": f"{url}/messages", "test": f"{url}/test"},
    )


def _with_secret(made: webhooks.WithSecret, response: Response) -> WebhookWithSecret:
    response.headers["Cache-Control"] = "no-store"
    return WebhookWithSecret(**_shown(made.endpoint).model_dump(), secret=made.secret)


def _message(message: WebhookMessage) -> Message:
    pending = message.status == "pending"
    return Message(
        id=message.id,
        type=message.type,
        data=message.data,
        status=message.status,
        attempts=message.attempts,
        next_attempt_at=as_time(message.next_attempt_at) if pending else None,
        answer_status=message.answer_status,
        error=message.error,
        created_at=as_time(message.created_at),
        ended_at=message.ended_at and as_time(message.ended_at),
    )
