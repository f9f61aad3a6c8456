"""API keys, for administrators."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import ConfigDict, Field

from app.access import Role
from app.api.dependencies import After, Caller, CurrentSettings, Limit, Page, ReadSession, WriteSession
from app.api.problems import problem_responses
from app.api.request_body import RequestBody
from app.api.texts import Name
from app.db.tables import ApiKey
from app.services import keys
from app.services.job_view import as_time, link
from app.spec.documented import Documented

# Not an IdempotentRoute: kept answers would hold keys.
router = APIRouter(prefix="/keys", tags=["keys"])

KeyId = Annotated[str, Path(pattern=r"^key_[0-9a-z]{1,40}$", description="Id of the key.")]


class CreateKey(RequestBody):
    """A key to be made."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "nightly build", "role": "submitter"}]}
    )

    name: Name
    """Whom or what it is for."""
    role: Role
    """`reader` sees everything, `submitter` uploads, submits and deletes as well, `administrator` makes keys as well."""
    expires_in_days: Annotated[float, Field(gt=0, le=3650)] | None = None
    """When it ends by itself. Left out: never."""


class KeyView(Documented):
    """A key, without its secret."""

    id: str = Field(examples=["key_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    name: str = Field(examples=["nightly build"])
    role: Role
    created_at: datetime
    created_by: str
    """Id of the key that made it, `anonymous`, or `command line`."""
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    """To the minute; null: never."""
    url: str


class CreatedKey(KeyView):
    """A key that has just been made."""

    key: str = Field(examples=["mp_01k0b6x2v9m4c8d7e5f3g1h0j2_…"])
    """The key itself. Keep it: it is not kept here, and is never shown again."""


@router.post("", operation_id="create_key", status_code=201, summary="Make a key")
def create_key(
    body: CreateKey, session: WriteSession, settings: CurrentSettings, caller: Caller, response: Response
) -> CreatedKey:
    """Make a key; the answer is the only place where it is ever seen.

    Takes no Idempotency-Key, since a kept answer would be a kept key: when an answer is lost, revoke what it made.
    """
    made = keys.create_key(
        session,
        settings,
        name=body.name,
        role=body.role,
        days=body.expires_in_days,
        created_by=caller.name,
    )
    shown = _shown(made.row)
    response.headers["Location"] = shown.url
    response.headers["Cache-Control"] = "no-store"
    return CreatedKey(**shown.model_dump(), key=made.token)


@router.get("", operation_id="list_keys", summary="List keys")
def list_keys(session: ReadSession, limit: Limit = 20, after: After = None) -> Page[KeyView]:
    """Keys, newest first, those that have expired or were revoked too."""
    found, has_more = keys.list_keys(session, limit=limit, after=after)
    return Page(items=[_shown(key) for key in found], has_more=has_more)


@router.get("/{key_id}", operation_id="get_key", summary="See a key", responses=problem_responses(404))
def get_key(key_id: KeyId, session: ReadSession) -> KeyView:
    """Role, times and last use of a key."""
    return _shown(keys.get_key(session, key_id))


@router.delete(
    "/{key_id}",
    operation_id="revoke_key",
    status_code=204,
    summary="Revoke a key",
    responses=problem_responses(404),
)
def revoke_key(key_id: KeyId, session: WriteSession) -> None:
    """Make a key useless from the next call on. It stays in the list. Safe to repeat."""
    keys.revoke_key(session, key_id)


def _shown(key: ApiKey) -> KeyView:
    return KeyView(
        id=key.id,
        name=key.name,
        role=Role(key.role),
        created_at=as_time(key.created_at),
        created_by=key.created_by,
        expires_at=key.expires_at and as_time(key.expires_at),
        revoked_at=key.revoked_at and as_time(key.revoked_at),
        last_used_at=key.last_used_at and as_time(key.last_used_at),
        url=link(f"/keys/{key.id}"),
    )
