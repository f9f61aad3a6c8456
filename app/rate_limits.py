"""How often a tenant may call: counted in Redis, so that all API processes count together.

The generic cell rate algorithm: one number a tenant, the time at which all its calls so far would be paid off at the
steady rate. A burst of a minute's calls passes at once; after it, calls pass as fast as they are paid off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from redis import Redis

WINDOW_SECONDS = 60
_TIMEOUT_SECONDS = 0.5
_AWAY_SECONDS = 5.0
_log = structlog.get_logger(__name__)

# Redis' clock, since those of API processes differ. Returns seconds until everything is paid off, and whether to wait.
_TAKE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local interval, window = tonumber(ARGV[1]), tonumber(ARGV[2])
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now)
if due + interval - now > window + 0.000001 then return {tostring(due - now), 0} end
redis.call('SET', KEYS[1], string.format('%.6f', due + interval), 'EX', math.ceil(window) + 1)
return {tostring(due + interval - now), 1}
"""


@dataclass(frozen=True)
class Allowance:
    """What is left to a tenant now."""

    allowed: bool
    remaining: int
    """Calls that would pass now."""
    reset_seconds: int
    """Until all of them would again; for a call that was not allowed, until one would."""


class RateLimiter:
    """Counts calls on one server. When it does not answer, calls pass: a limit is no reason to be down."""

    def __init__(self, url: str, per_minute: int) -> None:
        self.per_minute = per_minute
        self._url = url
        self._interval = WINDOW_SECONDS / per_minute
        self._redis: Redis | None = None
        self._away_until = 0.0

    def take(self, tenants: Sequence[str]) -> list[Allowance] | None:
        """Count a call of each of these tenants, in this order, on one way to the server. None: nobody counts now."""
        # A seventh of the time that all of the API takes to import.
        from redis import Redis, RedisError

        if time.monotonic() < self._away_until:
            return None
        if self._redis is None:
            self._redis = Redis.from_url(
                self._url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS
            )
        pipeline = self._redis.pipeline(transaction=False)
        for tenant in tenants:
            pipeline.eval(_TAKE, 1, f"modelpress:calls:{tenant}", self._interval, WINDOW_SECONDS)
        try:
            counted = pipeline.execute()
        except RedisError as error:
            self._away_until = time.monotonic() + _AWAY_SECONDS
            _log.warning("rate_limits_away", error=str(error))
            return None
        return [self._allowance(float(debt), allowed=bool(allowed)) for debt, allowed in counted]

    def _allowance(self, debt: float, *, allowed: bool) -> Allowance:
        """`debt`: seconds at the steady rate that the calls so far still cost."""
        if not allowed:
            return Allowance(False, 0, max(1, math.ceil(debt + self._interval - WINDOW_SECONDS)))
        remaining = math.floor((WINDOW_SECONDS - debt) / self._interval + 1e-6)
        return Allowance(True, remaining, math.ceil(debt))
