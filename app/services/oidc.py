"""Bearer tokens of an OpenID Connect issuer: verified here, by the issuer's public keys.

The algorithms are pinned, so that neither `none` nor a public key used as an HMAC secret passes. Keys are fetched when
a token names one that is not known, at most every few seconds, and kept while the issuer is away.
"""

from __future__ import annotations

import contextlib
import threading
import time
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
from sqlalchemy.exc import IntegrityError

from app.access import Principal, Role
from app.db import key_queries
from app.db.engine import Database
from app.errors import Forbidden, ModelpressError, Unauthenticated, Unavailable
from app.services import keys
from app.settings import Settings, is_loopback

ALGORITHMS = ("RS256", "ES256")
FRESH_SECONDS = 600.0
"""Keys are fetched anew after this long, so that one the issuer has withdrawn is forgotten."""
RETRY_SECONDS = 10.0
"""Between two fetches, however many unknown keys are named."""
_LEEWAY_SECONDS = 30
_TIMEOUT_SECONDS = 5.0
_MAX_NAME = 200


def authenticate(database: Database, settings: Settings, token: str) -> Principal:
    """Whoever a token stands for. Raises Unauthenticated, Forbidden when it has no tenant or role, and Unavailable."""
    claims = _verified(settings, token)
    tenant, role = claims.get(settings.oidc_tenant_claim), _role(claims.get(settings.oidc_role_claim))
    if not isinstance(tenant, str) or not keys.TENANT_NAME.fullmatch(tenant) or role is None:
        raise Forbidden(
            f"The token names no tenant (claim {settings.oidc_tenant_claim!r}) or no role of this service (claim "
            f"{settings.oidc_role_claim!r}: {', '.join(Role)}).",
            code="claims_missing",
            hint="Have the issuer put both into the tokens for this audience.",
        )
    _ensure_tenant(database, tenant)
    return Principal(f"oidc:{claims['sub']}"[:_MAX_NAME], role, tenant)


def _verified(settings: Settings, token: str) -> dict[str, Any]:
    """The claims of a token that is good now."""
    try:
        header = jwt.get_unverified_header(token)
        if header.get("alg") not in ALGORITHMS:
            raise _refused(f"it is not signed with {' or '.join(ALGORITHMS)}")
        key = issuer_keys(settings.oidc_issuer).find(header.get("kid"), header["alg"])
        return jwt.decode(
            token,
            key,
            algorithms=list(ALGORITHMS),
            audience=settings.oidc_audience,
            issuer=settings.oidc_issuer,
            leeway=_LEEWAY_SECONDS,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
    except jwt.ExpiredSignatureError:
        raise Unauthenticated(
            "The token has expired.", code="token_expired", hint="Ask the issuer for another."
        ) from None
    except jwt.InvalidTokenError as error:
        raise _refused(str(error)) from None


class IssuerKeys:
    """The public keys of one issuer, kept between calls."""

    def __init__(self, issuer: str) -> None:
        self._issuer = issuer.rstrip("/")
        self._keys: dict[tuple[str | None, str], jwt.PyJWK] = {}
        self._fetched_at = -FRESH_SECONDS
        self._tried_at = -RETRY_SECONDS
        self._lock = threading.Lock()

    def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK:
        """The key a token names, for its algorithm. Raises Unauthenticated, and Unavailable when none was ever fetched."""
        with self._lock:
            now = time.monotonic()
            missing = (kid, algorithm) not in self._keys or now - self._fetched_at >= FRESH_SECONDS
            if missing and now - self._tried_at >= RETRY_SECONDS:
                self._tried_at = now
                self._fetch(now)
            found = self._keys.get((kid, algorithm))
        if found is None and not self._keys:
            raise _away(self._issuer)
        if found is None:
            raise _refused("the issuer has no such key")
        return found

    def _fetch(self, now: float) -> None:
        """Replace the keys by the issuer's; while it is away, those that are known go on."""
        try:
            discovery = _get(f"{self._issuer}/.well-known/openid-configuration")
            found = jwt.PyJWKSet.from_dict(_get(discovery["jwks_uri"])).keys
        except (httpx.HTTPError, jwt.PyJWKError, jwt.PyJWKSetError, ValueError, KeyError, TypeError) as error:
            if not self._keys:
                raise _away(self._issuer) from error
            return
        self._keys = {(key.key_id, key.algorithm_name): key for key in found}
        self._fetched_at = now


@lru_cache(maxsize=1)
def issuer_keys(issuer: str) -> IssuerKeys:
    """The keys of this process's issuer."""
    return IssuerKeys(issuer)


@lru_cache(maxsize=1024)
def _ensure_tenant(database: Database, tenant: str) -> None:
    """Tenants that the issuer names are made when they first call."""
    with database.read() as session:
        known = key_queries.has_tenant(session, tenant)
    if not known:
        # Another of the tenant's first calls may be making it now.
        with contextlib.suppress(IntegrityError), database.write() as session:
            key_queries.ensure_tenant(session, tenant)


def _get(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise ValueError(f"{url} is not https")
    answer = httpx.get(url, timeout=_TIMEOUT_SECONDS, follow_redirects=False)
    answer.raise_for_status()
    return dict(answer.json())


def _role(claim: object) -> Role | None:
    """The highest of the roles in a claim: a word, or a list of words."""
    words = [claim] if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return max((role for role in Role if role.value in words), key=list(Role).index, default=None)


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"The token is not good: {why}.",
        code="token_invalid",
        hint="Ask the issuer for one for this service.",
    )


def _away(issuer: str) -> ModelpressError:
    return Unavailable(
        f"The keys of {issuer} cannot be fetched, so no token of its can be checked.",
        code="issuer_unavailable",
        hint="Try again in a few seconds, or use an API key.",
    )
