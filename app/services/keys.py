"""API keys, `mp_<id>_<secret>`: made and shown once, checked on every call, revoked.

The database has an HMAC of each key under the service's secret, which is not in the database: neither a copy of the
database nor the right to write to it makes a key that works.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sqlalchemy.orm import Session

from app.access import Principal, Role
from app.db import key_queries
from app.db.engine import Database
from app.db.tables import ApiKey
from app.errors import InvalidRequest, NotFound, Unauthenticated, Unavailable
from app.ids import new_id, new_secret
from app.settings import Settings, is_loopback

TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
PREFIX = "mp_"
_KEY = re.compile(rf"{PREFIX}([0-9a-z]{{26}})_[0-9a-z]{{52}}")
_UNKNOWN_DIGEST = "0" * 64


@dataclass(frozen=True)
class NewKey:
    """A key that has just been made, and the only time its words are known."""

    row: ApiKey
    token: str


def ensure_tenant(session: Session, tenant: str) -> None:
    """Make a tenant unless it is there. Raises InvalidRequest for what can be no name of one."""
    if not TENANT_NAME.fullmatch(tenant):
        raise InvalidRequest(
            f"{tenant[:100]!r} cannot be the name of a tenant.",
            code="tenant_name",
            hint="Use up to 63 lower-case letters, digits and hyphens, e.g. `acme`.",
        )
    key_queries.ensure_tenant(session, tenant)


def create_key(
    session: Session, settings: Settings, *, name: str, role: Role, days: float | None, created_by: str
) -> NewKey:
    """Make a key for the session's tenant that expires after `days`; None: never. Raises what `server_secret` raises."""
    key_id, secret = new_id("key"), new_secret()
    token = f"{PREFIX}{key_id.removeprefix('key_')}_{secret}"
    row = ApiKey(
        id=key_id,
        name=name,
        role=role.value,
        digest=_digest(server_secret(settings), token),
        created_by=created_by,
    )
    seconds = None if days is None else days * 86_400
    return NewKey(key_queries.add_key(session, row, expires_in_seconds=seconds), token)


def authenticate(database: Database, settings: Settings, token: str) -> Principal:
    """Whose key this is, of any tenant. Raises Unauthenticated when it is none of ours, has expired or was revoked."""
    found = _KEY.fullmatch(token)
    if found is None:
        raise _not_ours()
    key_id = f"key_{found[1]}"
    with database.read() as session:
        state = key_queries.read_key_state(session, key_id)
    # An unknown id takes as long as a wrong secret.
    digest = state.digest if state else _UNKNOWN_DIGEST
    if not hmac.compare_digest(_digest(server_secret(settings), token), digest) or state is None:
        raise _not_ours()
    if state.revoked or state.expired:
        reason = "was revoked" if state.revoked else "has expired"
        raise Unauthenticated(
            f"The API key {key_id} {reason}.",
            code="key_revoked" if state.revoked else "key_expired",
            hint="Ask an administrator for another.",
        )
    if not state.used_lately:
        _mark_used(database, key_id)
    return Principal(key_id, Role(state.role), state.tenant)


def get_key(session: Session, key_id: str) -> ApiKey:
    """One key. Raises NotFound."""
    key = key_queries.get_key(session, key_id)
    if key is None:
        raise NotFound(f"There is no key {key_id}.", hint="GET /v1/keys lists those there are.")
    return key


def list_keys(session: Session, *, limit: int, after: str | None) -> tuple[list[ApiKey], bool]:
    """A page of keys, newest first, and whether there are more."""
    keys = key_queries.list_keys(session, limit=limit + 1, after=after)
    return list(keys[:limit]), len(keys) > limit


def revoke_key(session: Session, key_id: str) -> ApiKey:
    """Make a key useless; calls under way end as they would have. Safe to repeat. Raises NotFound."""
    key = get_key(session, key_id)
    key_queries.revoke_key(session, key_id)
    session.refresh(key)
    return key


@lru_cache(maxsize=1)
def server_secret(settings: Settings) -> bytes:
    """What keys' digests are made with. On loopback it need not be set: a file in the data directory has it then.

    Raises InvalidRequest when it is needed.
    """
    given = settings.secret_key.get_secret_value()
    if given:
        return given.encode()
    if not is_loopback(settings.host):
        raise InvalidRequest(
            "MODELPRESS_SECRET_KEY is not set.",
            code="secret_key_missing",
            hint="Make one with `openssl rand -hex 32`, and give the same to every API process and to `modelpress keys`.",
        )
    return _secret_file(settings.data_dir.absolute() / "secret.key")


def _secret_file(path: Path) -> bytes:
    """The secret in a file only its owner may read. Of processes that make it at once, one wins."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}-{new_secret()[:16]}")
        with open(own, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(new_secret())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        own.unlink()
    return path.read_bytes()


def _digest(secret: bytes, token: str) -> str:
    return hmac.new(secret, token.encode(), hashlib.sha256).hexdigest()


def _mark_used(database: Database, key_id: str) -> None:
    # A database that only reads now is no reason to refuse a good key.
    with contextlib.suppress(Unavailable), database.write() as session:
        key_queries.mark_used(session, key_id)


def _not_ours() -> Unauthenticated:
    return Unauthenticated(
        "This is no API key of this service.",
        code="key_unknown",
        hint="Send it as it was shown when it was made: `Authorization: Bearer mp_…`.",
    )
