"""A supervisor's hold on a job: every write carries the fence, and finding it lost ends the attempt."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from app.db import job_claims
from app.db.engine import Database
from app.db.job_claims import Claim
from app.errors import Unavailable

_DATABASE_PATIENCE_SECONDS = 600

T = TypeVar("T")


class LeaseLost(Exception):  # noqa: N818 - an outcome, not an error
    """Somebody else holds the job now."""


class CancelRequested(Exception):  # noqa: N818
    """Somebody asked for the job to be cancelled."""


def write_patiently(database: Database, action: Callable[[Session], T]) -> T:
    """Run a transaction, waiting for a database that is away. A lease lost meanwhile shows in its result."""
    give_up = time.monotonic() + _DATABASE_PATIENCE_SECONDS
    while True:
        try:
            with database.write() as session:
                return action(session)
        except Unavailable:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.5)


class Lease:
    """A claim, and the database it is kept in."""

    def __init__(self, database: Database, claim: Claim, *, lease_seconds: float) -> None:
        self.database = database
        self.claim = claim
        self.lease_seconds = lease_seconds

    def write(self, action: Callable[[Session, Claim], T]) -> T:
        """Run a transaction that guards itself with the claim; the caller looks at what it returns."""
        return write_patiently(self.database, lambda session: action(session, self.claim))

    def require(self, action: Callable[[Session, Claim], bool]) -> None:
        """Run a transaction that returns False when the lease is lost. Raises LeaseLost then."""
        if not self.write(action):
            raise LeaseLost

    def note(self, kind: str, data: dict[str, Any]) -> None:
        """Append an event."""
        self.require(lambda s, claim: job_claims.add_held_events(s, claim, [(kind, data)]))

    def beat(self) -> None:
        """Renew the lease. Raises LeaseLost or CancelRequested."""
        cancel = self.write(
            lambda s, claim: job_claims.extend_lease(s, claim, lease_seconds=self.lease_seconds)
        )
        if cancel is None:
            raise LeaseLost
        if cancel:
            raise CancelRequested

    def check_requests(self) -> bool:
        """Look, without writing, what was asked for: whether training is to stop. Raises CancelRequested."""
        # A database that is away now says nothing; the heartbeat will wait for it.
        with contextlib.suppress(Unavailable), self.database.read() as session:
            cancel, keep_best = job_claims.requests(session, self.claim.job_id)
            if cancel:
                raise CancelRequested
            return keep_best
        return False
