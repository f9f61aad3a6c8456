"""Endpoints that are told of jobs, and the messages they were or will be sent."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.access import Principal
from app.addresses import Refused, Unanswered, check_address
from app.db import webhook_queries as queries
from app.db.tables import WebhookEndpoint, WebhookMessage
from app.errors import Conflict, Fault, InvalidRequest, NotFound
from app.ids import new_id
from app.services.keys import server_secret
from app.services.webhook_secrets import endpoint_secret
from app.settings import Settings

PREVIOUS_SECRET_SECONDS = 24 * 3600.0
"""How long messages are signed with the secret before as well."""
_MAX_ENDPOINTS = 100


@dataclass(frozen=True)
class WithSecret:
    """An endpoint and its secret, at the only moments it is shown."""

    endpoint: WebhookEndpoint
    secret: str


def create_endpoint(
    session: Session, settings: Settings, *, url: str, events: list[str], description: str
) -> WithSecret:
    """Make an endpoint. Raises InvalidRequest for a URL that we would never call, and Conflict at a hundred endpoints."""
    try:
        check_address(url, settings.outbound_networks)
    except Refused as error:
        raise InvalidRequest(
            "The request has 1 fault; see `errors`.", faults=[Fault("/url", str(error))]
        ) from None
    except Unanswered:
        # A name may be entered before it is announced.
        pass
    if queries.count_endpoints(session) >= _MAX_ENDPOINTS:
        raise Conflict(
            f"There are {_MAX_ENDPOINTS} webhooks already.",
            code="too_many_webhooks",
            hint="Delete some with DELETE /v1/webhooks/{id}; one can be told of every event.",
        )
    endpoint = queries.add_endpoint(
        session, WebhookEndpoint(id=new_id("whe"), url=url, events=sorted(events), description=description)
    )
    return WithSecret(endpoint, _secret(settings, endpoint))


def get_endpoint(session: Session, endpoint_id: str) -> WebhookEndpoint:
    """One endpoint. Raises NotFound."""
    endpoint = queries.get_endpoint(session, endpoint_id)
    if endpoint is None:
        raise NotFound(f"There is no webhook {endpoint_id}.", hint="GET /v1/webhooks lists those there are.")
    return endpoint


def delete_endpoint(session: Session, endpoint_id: str) -> None:
    """Delete an endpoint and every message to it. Raises NotFound."""
    get_endpoint(session, endpoint_id)
    queries.delete_endpoint(session, endpoint_id)


def rotate_secret(session: Session, settings: Settings, endpoint_id: str) -> WithSecret:
    """Give an endpoint another secret; for a day messages carry the signatures of both. Raises NotFound."""
    endpoint = get_endpoint(session, endpoint_id)
    queries.rotate_secret(session, endpoint_id, previous_holds_seconds=PREVIOUS_SECRET_SECONDS)
    session.refresh(endpoint)
    return WithSecret(endpoint, _secret(settings, endpoint))


def enable_endpoint(session: Session, endpoint_id: str) -> WebhookEndpoint:
    """Tell an endpoint of what happens from now on. Raises NotFound."""
    endpoint = get_endpoint(session, endpoint_id)
    queries.set_disabled(session, endpoint_id, None)
    session.refresh(endpoint)
    return endpoint


def send_test(session: Session, endpoint_id: str, caller: Principal) -> WebhookMessage:
    """Send an endpoint a message that says nothing. Raises NotFound."""
    get_endpoint(session, endpoint_id)
    return queries.add_message(
        session, endpoint_id, caller.tenant, queries.TEST_EVENT, {"sent_by": caller.name}
    )


def replay(session: Session, endpoint_id: str, message_id: str) -> WebhookMessage:
    """Send a message again, whatever became of it. Raises NotFound, and Conflict while its endpoint is disabled."""
    endpoint = get_endpoint(session, endpoint_id)
    message = queries.get_message(session, endpoint_id, message_id)
    if message is None:
        raise NotFound(
            f"There is no message {message_id} to {endpoint_id}.",
            hint=f"GET /v1/webhooks/{endpoint_id}/messages lists those there are; old ones are deleted.",
        )
    if endpoint.disabled_reason is not None:
        raise Conflict(
            f"Webhook {endpoint_id} is disabled: {endpoint.disabled_reason}",
            code="webhook_disabled",
            hint=f"POST /v1/webhooks/{endpoint_id}/enable first.",
        )
    queries.send_again(session, message_id)
    session.refresh(message)
    return message


def _secret(settings: Settings, endpoint: WebhookEndpoint) -> str:
    return endpoint_secret(server_secret(settings), endpoint.id, endpoint.secret_version)
