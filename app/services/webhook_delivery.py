"""Sends what is due to webhooks: at least once, over three days, whatever dies in between.

Any number of processes may do so at once: a message is taken by one, and by another when that one is not heard of again.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Self

import structlog

from app.addresses import Refused, Unanswered
from app.db import webhook_queries as queries
from app.db.engine import Database
from app.db.webhook_queries import Due
from app.outbound import Bounds, post
from app.services.keys import server_secret
from app.services.loops import forever
from app.services.webhook_secrets import endpoint_secret, signature
from app.settings import Settings

WAITS = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""Seconds from each attempt to the next, as Standard Webhooks proposes: ten attempts in three days."""
_JITTER = 0.1
_AT_ONCE = 16
_OF_ONE_ENDPOINT = 4
_IDLE_SECONDS = 1.0
_KEPT_SECONDS = 30 * 86_400.0
_FORGET_EVERY_SECONDS = 3600.0
_GONE = 410

_log = structlog.get_logger(__name__)


def deliver_forever(database: Database, settings: Settings, stop: threading.Event) -> None:
    """Send until told to stop; a database that is away is met again next time."""
    next_forget = time.monotonic()

    def work() -> None:
        nonlocal next_forget
        while deliveries.start_due() and not stop.is_set():
            deliveries.wait_for_one()
        if time.monotonic() >= next_forget:
            next_forget = time.monotonic() + _FORGET_EVERY_SECONDS
            with database.write() as session:
                queries.forget_old(session, seconds_ago=_KEPT_SECONDS)

    with Deliveries(database, settings) as deliveries:
        forever(work, stop, name="webhooks", every_seconds=_IDLE_SECONDS)


class Deliveries:
    """Attempts under way in this process: a few at once, and fewer to one endpoint, so that one that hangs delays no other's."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="webhook")
        self._under_way: dict[Future[None], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for those under way: each ends by its own deadline."""
        self._pool.shutdown()

    def start_due(self) -> int:
        """Begin one attempt for each message that is due, as far as there are places. Returns how many."""
        self._under_way = {f: endpoint for f, endpoint in self._under_way.items() if not f.done()}
        attempts = Counter(self._under_way.values())
        places = queries.Places(
            total=_AT_ONCE - len(self._under_way),
            each=_OF_ONE_ENDPOINT,
            full=tuple(endpoint for endpoint, number in attempts.items() if number >= _OF_ONE_ENDPOINT),
        )
        taken = self._take(places) if places.total else []
        for due in taken:
            attempt = self._pool.submit(_attempt, self._database, self._settings, due)
            self._under_way[attempt] = due.endpoint_id
        return len(taken)

    def wait_for_one(self) -> None:
        """Wait until an attempt has ended, for a second at most."""
        wait(self._under_way, timeout=_IDLE_SECONDS, return_when=FIRST_COMPLETED)

    def _take(self, places: queries.Places) -> list[Due]:
        with self._database.read() as session:
            if not queries.is_any_due(session):
                return []
        # Twice the time an attempt may take: none is taken by another while it is under way.
        claim = 2 * self._settings.webhook_timeout_seconds + 10
        with self._database.write() as session:
            return queries.take_due(session, places, claim_seconds=claim)


def cloud_event(due: Due, public_url: str) -> bytes:
    """The body: a CloudEvent 1.0 in JSON."""
    url = f"{public_url.rstrip('/')}/v1/jobs/{due.data['job']}" if "job" in due.data else None
    event = {
        "specversion": "1.0",
        "id": due.id,
        "source": public_url or "/",
        "type": f"modelpress.{due.type}",
        "time": datetime.fromtimestamp(due.created_at, UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": due.data | ({"url": url} if url else {}),
    }
    if "job" in due.data:
        event["subject"] = due.data["job"]
    return json.dumps(event, separators=(",", ":")).encode()


def _attempt(database: Database, settings: Settings, due: Due) -> None:
    try:
        status, error = _send(settings, due)
    except Exception:  # noqa: BLE001 - logged with its trace
        _log.exception("webhook_not_sent", message=due.id)
        status, error = None, "It could not be sent; the service's log has the reason."
    # PostgreSQL keeps no NUL in a text.
    error = error and error.replace("\0", "")
    if status is not None and 200 <= status < 300:
        outcome, wait = "delivered", 0.0
    elif due.attempt > len(WAITS) or status == _GONE:
        outcome, wait = "dead", 0.0
    else:
        # Of messages that failed together, not all come back at once.
        spread = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - nothing to guess
        outcome, wait = "pending", WAITS[due.attempt - 1] * spread
    with database.write() as session:
        # First: two that do so at once must take their locks in the same order.
        if status == _GONE:
            queries.set_disabled(session, due.endpoint_id, "It answered 410 Gone.")
        queries.end_attempt(
            session, due, status=outcome, retry_in_seconds=wait, answer_status=status, error=error
        )
    _log.info(
        "webhook_sent", message=due.id, endpoint=due.endpoint_id, attempt=due.attempt, outcome=outcome,
        answer_status=status, error=error,
    )  # fmt: skip


def _send(settings: Settings, due: Due) -> tuple[int | None, str | None]:
    """The status that was answered, or why there was none."""
    body, now = cloud_event(due, settings.public_url), int(time.time())
    versions = [due.secret_version, *([due.secret_version - 1] if due.previous_secret_holds else [])]
    secrets = [endpoint_secret(server_secret(settings), due.endpoint_id, version) for version in versions]
    headers = {
        "content-type": "application/cloudevents+json; charset=utf-8",
        "user-agent": "modelpress-webhooks",
        "webhook-id": due.id,
        "webhook-timestamp": str(now),
        "webhook-signature": signature(secrets, due.id, now, body),
    }
    bounds = Bounds(
        seconds=settings.webhook_timeout_seconds, answer_bytes=500, allowed=settings.outbound_networks
    )
    try:
        answer = post(due.url, body, headers, bounds)
    except (Refused, Unanswered) as error:
        return None, str(error)[:500]
    if 200 <= answer.status < 300:
        return answer.status, None
    return answer.status, answer.body.decode(errors="replace") or None
