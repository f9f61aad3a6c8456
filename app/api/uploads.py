"""Uploads: large files, in parts that can be sent in any order and again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field, StringConstraints

from app.api.bodies import RAW_PART, ContentDigest, FileName, chunks_of, declared_length, parse_digest
from app.api.dependencies import CurrentSettings, TenantDatabase, WriteSession
from app.api.idempotency import IdempotentRoute
from app.api.problems import problem_responses
from app.api.request_body import RequestBody
from app.db import tables
from app.db.tables import Import, UploadPart
from app.services import uploads
from app.services.job_view import link
from app.services.upload_states import UploadState
from app.services.url_imports import shown_url
from app.spec.documented import Documented
from app.storage import get_staging
from app.threads import INTAKE

router = APIRouter(prefix="/uploads", tags=["uploads"], route_class=IdempotentRoute)

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
UploadId = Annotated[str, Path(pattern=r"^upl_[0-9a-z]{1,40}$", description="Id of the upload.")]
PartNumber = Annotated[int, Path(ge=1, le=10**9, description="Number of the part, from 1.")]


class CreateUpload(RequestBody):
    """What is going to be uploaded."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"name": "notes.txt", "size": 12}]},
    )

    name: FileName
    """The file's name. Its ending is only a hint: what a file is, its first bytes decide."""
    size: Annotated[int, Field(ge=1)]
    """Bytes of the whole file."""
    sha256: Sha256 | None = None
    """sha256 of the whole file in hex, if you know it; completing then fails when the bytes are others."""
    direct: bool = False
    """Ask to send the parts to S3 yourself, by URLs that are signed for each. The answer's `direct` says whether you are to."""


class Part(Documented):
    """A part that has arrived whole."""

    number: int = Field(examples=[1])
    """From 1."""
    bytes: int = Field(examples=[12])
    """Bytes of the part."""
    sha256: str | None
    """sha256 of the part in hex, if you sent its Content-Digest or announced it."""


class UploadUrls(Documented):
    """Where to go from here."""

    self: str
    part: str | None
    """PUT parts here, with the number in place of `{number}`. Null: they go to S3, or the service fetches the file itself."""
    part_urls: str | None
    """Of a direct upload: where its parts go in S3."""
    complete: str | None
    """Null: an import, which completes by itself."""


class FetchError(Documented):
    """Why an import failed, or why its last attempt did."""

    code: str = Field(examples=["import_unanswered"])
    detail: str
    hint: str | None


class Fetch(Documented):
    """How far the service is with fetching an import."""

    url: str = Field(examples=["https://example.org/models/tiny.zip"])
    """Where from, without the query: that may be a secret."""
    status: Literal["waiting", "running", "ended"]
    bytes: int = Field(examples=[12])
    """How many have come, told every few seconds."""
    attempt: int = Field(examples=[1])
    """The last one since it got on, from 1; 0: it has not begun."""
    next_attempt_at: datetime | None
    """While it waits."""
    error: FetchError | None


class Upload(Documented):
    """A file on its way in."""

    id: str = Field(examples=["upl_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    name: str = Field(examples=["notes.txt"])
    status: str = Field(examples=["open"])
    """`open` while parts may come in, then `completed`. An import is `importing`, then `completed` or `failed`."""
    size: int | None = Field(examples=[12])
    """Bytes of the whole file; null for an import whose server has not said."""
    sha256: str | None
    """sha256 of the whole file in hex: what you announced, or, once completed, what arrived. A direct upload is hashed
    when something is made of it; until then it is what you announced, or null."""
    direct: bool = Field(examples=[False])
    """Whether its parts go to S3 by URLs of `urls.part_urls`, rather than through the service."""
    part_bytes: int = Field(examples=[67108864])
    """Bytes of every part but the last, which has what is left. 0 for an import, which has none."""
    part_count: int = Field(examples=[1])
    """How many parts the file has."""
    parts: list[Part]
    """Parts that have arrived."""
    missing: list[int] = Field(examples=[[1]])
    """Numbers of the parts that have not."""
    fetch: Fetch | None
    """Of an import; null for a file that you send."""
    created_at: datetime
    expires_at: datetime
    """An upload nothing was made of by then is removed."""
    urls: UploadUrls


@router.post(
    "",
    operation_id="create_upload",
    status_code=201,
    summary="Start an upload",
    responses=problem_responses(507),
)
def create_upload(
    body: CreateUpload, session: WriteSession, settings: CurrentSettings, response: Response
) -> Upload:
    """Announce a file. The answer says how many parts to send and how large they are.

    Then `PUT` each part (in any order, several at once if you like), `complete` the upload, and make a model or a
    dataset of it with `POST /v1/models` or `POST /v1/datasets`.
    """
    upload = tables.Upload(name=body.name, size=body.size, sha256=body.sha256)
    state = uploads.create_upload(session, get_staging(), settings, upload, direct=body.direct)
    shown = upload_view(state)
    response.headers["Location"] = shown.urls.self
    return shown


@router.put(
    "/{upload_id}/parts/{number}",
    operation_id="put_upload_part",
    summary="Send a part",
    responses=problem_responses(404, 409, 507),
    openapi_extra=RAW_PART,
)
async def put_upload_part(
    upload_id: UploadId,
    number: PartNumber,
    request: Request,
    database: TenantDatabase,
    content_digest: ContentDigest = None,
) -> Part:
    """Send one part as the raw body. Sending it again is harmless; sending other bytes for it is refused.

    A part counts once it has arrived whole. When a connection breaks, send the part again.
    """
    part = await uploads.receive_part(
        database,
        get_staging(),
        part=(upload_id, number),
        declared=(declared_length(request), parse_digest(content_digest)),
        chunks=chunks_of(request),
    )
    return _part(part)


@router.get(
    "/{upload_id}",
    operation_id="get_upload",
    summary="See what has arrived",
    responses=problem_responses(404),
)
def get_upload(upload_id: UploadId, database: TenantDatabase) -> Upload:
    """Show an upload: which parts have arrived and which are missing, or how far an import is. Ask this to resume."""
    return upload_view(uploads.get_upload(database, upload_id))


@router.post(
    "/{upload_id}/complete",
    operation_id="complete_upload",
    summary="Complete an upload",
    responses=problem_responses(404, 409, 507),
)
async def complete_upload(upload_id: UploadId, database: TenantDatabase, settings: CurrentSettings) -> Upload:
    """Check that every part is there and that the whole has the sha256 you announced, if you did.

    The answer carries the sha256 of what arrived. With a wrong one the upload is removed. What is in S3 is hashed when
    something is made of it, and refused then.
    """
    state = await INTAKE.run(uploads.complete_upload, database, get_staging(), settings, upload_id)
    return upload_view(state)


@router.delete(
    "/{upload_id}",
    operation_id="delete_upload",
    status_code=204,
    summary="Drop an upload",
    responses=problem_responses(404),
)
def delete_upload(upload_id: UploadId, session: WriteSession) -> None:
    """Drop an upload and what has arrived of it. An import that is under way stops."""
    uploads.delete_upload(session, get_staging(), upload_id)


def upload_view(state: UploadState) -> Upload:
    """An upload as it is shown."""
    upload, fetch = state.upload, state.fetch
    url = link(f"/uploads/{upload.id}")
    return Upload(
        id=upload.id,
        name=upload.name,
        status=upload.status,
        size=upload.size if fetch is None else fetch.total,
        sha256=upload.sha256,
        direct=upload.direct,
        part_bytes=upload.part_bytes,
        part_count=state.part_count,
        parts=[_part(part) for part in state.parts],
        missing=state.missing if upload.status == "open" else [],
        fetch=fetch and _fetch(fetch),
        created_at=datetime.fromtimestamp(upload.created_at, UTC),
        expires_at=datetime.fromtimestamp(upload.expires_at, UTC),
        urls=UploadUrls(
            self=url,
            part=None if fetch or upload.direct else f"{url}/parts/{{number}}",
            part_urls=f"{url}/part-urls" if upload.direct else None,
            complete=None if fetch else f"{url}/complete",
        ),
    )


def _fetch(row: Import) -> Fetch:
    waits = row.due_at is not None and not row.running
    return Fetch(
        url=shown_url(row.url),
        status="waiting" if waits else "running" if row.running else "ended",
        bytes=row.bytes,
        attempt=row.attempt,
        next_attempt_at=datetime.fromtimestamp(row.due_at, UTC) if waits and row.due_at else None,
        error=None if row.error is None else FetchError.model_validate(row.error),
    )


def _part(part: UploadPart) -> Part:
    return Part(number=part.number, bytes=part.bytes, sha256=part.sha256)
