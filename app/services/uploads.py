"""Uploads: a file comes in part by part, in any order, and is checked as a whole when it is complete.

Parts take minutes and a transaction must not, so what receives bytes opens its own short sessions on the database
instead of being given one. A recorded part never changes: sending it again compares it with what is there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.db import import_queries
from app.db import model_queries as queries
from app.db.engine import Database, after_commit
from app.db.tables import Upload, UploadPart
from app.errors import Conflict, IntakeError, InvalidRequest, ModelpressError, PayloadTooLarge
from app.ids import new_id
from app.services import direct_uploads
from app.services.quotas import require_storage
from app.services.upload_states import (
    UploadState,
    found,
    incomplete,
    not_found,
    part_length,
    require_open,
    require_part,
)
from app.settings import Settings
from app.storage import get_staging
from app.storage.parts import PartFile, RunningDigests, create_file, digest_file, pump
from app.storage.staging import StagedFile, Staging, WorkDirectory

_RESEND = "Send this part again."
_STRAY_AFTER_SECONDS = 3600.0
_STRAY_WORK_AFTER_SECONDS = 2 * 86_400.0

_running = RunningDigests()


def create_upload(
    session: Session, staging: Staging, settings: Settings, upload: Upload, *, direct: bool = False
) -> UploadState:
    """Open an upload, given by name, size and sha256 if that is known; `direct`: to S3, if that is offered.

    Raises PayloadTooLarge, QuotaExceeded and StorageFull before a byte is sent.
    """
    if upload.size > settings.max_upload_bytes:
        raise PayloadTooLarge(
            f"{upload.name} has {upload.size} bytes; this service takes files of up to {settings.max_upload_bytes}.",
            hint="Ask the administrator to raise MODELPRESS_MAX_UPLOAD_BYTES.",
        )
    upload.id, upload.direct = new_id("upl"), direct and direct_uploads.offered(settings)
    require_storage(session, upload.size)
    if upload.direct:
        upload.part_bytes = direct_uploads.part_bytes(upload.size, settings)
    else:
        upload.part_bytes = settings.part_bytes
        staging.require_free(upload.size)
    queries.add_upload(session, upload, expires_in_seconds=settings.upload_expiry_seconds)
    if not upload.direct:
        create_file(staging.upload_path(upload.id), upload.size, staging.min_free_bytes)
    return UploadState(upload, ())


def get_upload(database: Database, upload_id: str) -> UploadState:
    """An upload and what has arrived of it; of a direct one, S3 is asked."""
    with database.read() as session:
        upload = found(queries.get_upload(session, upload_id), upload_id)
        if not upload.part_bytes:
            return UploadState(upload, (), import_queries.get_import(session, upload_id))
        parts = queries.list_parts(session, upload_id)
    return UploadState(upload, direct_uploads.arrived(upload, parts) if upload.direct else parts)


async def receive_part(
    database: Database,
    staging: Staging,
    *,
    part: tuple[str, int],
    declared: tuple[int | None, bytes | None],
    chunks: AsyncIterator[bytes],
) -> UploadPart:
    """Write the part (upload id, number from 1) to its place and record it once it is there whole.

    `declared` is the Content-Length and the sha256 the client announced, None where it did not. A part that cannot be
    finished is not recorded.
    """
    upload_id, number = part
    declared_length, declared_sha256 = declared
    opened = await asyncio.to_thread(_open_part, database, staging, part, declared_length)
    with opened.place as place:
        recorded = opened.recorded
        part_digest = hashlib.sha256() if declared_sha256 else None
        whole = _running.fork(upload_id, number) if recorded is None else None
        received = await pump(
            chunks,
            place.write if recorded is None else place.compare,
            *(digest.update for digest in (part_digest, whole) if digest is not None),
            limit=opened.length,
        )
        if received != opened.length:
            raise _wrong_length(number, opened.length, received)
        if part_digest is not None and part_digest.digest() != declared_sha256:
            raise _wrong_digest(number)
        if recorded is not None:
            return recorded
        sha256 = declared_sha256.hex() if declared_sha256 else None
        row = UploadPart(upload_id=upload_id, number=number, bytes=received, sha256=sha256)
        await asyncio.to_thread(_record_part, database, row)
        if whole is not None:
            _running.advance(upload_id, number, whole)
    return row


def complete_upload(database: Database, staging: Staging, settings: Settings, upload_id: str) -> UploadState:
    """Check that every part is there and that the whole has the promised sha256. Completing twice is harmless.

    What is in S3 is hashed when it is fetched, once, by whoever makes something of it. Raises Conflict
    (`upload_incomplete`) and, when the digest is wrong, IntakeError (`hash_mismatch`): the upload is then removed.
    """
    state = get_upload(database, upload_id)
    if state.upload.status == "completed":
        return state
    if state.fetch is not None:
        raise _is_import(upload_id)
    if state.missing:
        raise incomplete(state)
    if state.upload.direct:
        direct_uploads.assemble(state)
        sha256 = state.upload.sha256
    else:
        sha256 = _digest_staged(database, staging, state)
    with database.write() as session:
        queries.complete_upload(
            session, upload_id, sha256=sha256, expires_in_seconds=settings.upload_expiry_seconds
        )
    return get_upload(database, upload_id)


def completed_upload(
    database: Database, staging: Staging, work: WorkDirectory, upload_id: str
) -> tuple[str, StagedFile]:
    """Name and file of an upload that is complete; what is in S3 is fetched into the work directory.

    Raises NotFound, Conflict (`upload_incomplete`) and IntakeError (`hash_mismatch`).
    """
    with database.read() as session:
        upload = found(queries.get_upload(session, upload_id), upload_id)
        announced = queries.list_parts(session, upload_id) if upload.direct else ()
    if upload.status != "completed":
        raise Conflict(
            f"Upload {upload_id} is not complete.",
            code="upload_incomplete",
            hint=f"Send what is missing, then POST /v1/uploads/{upload_id}/complete. An import completes by itself, or "
            f"GET /v1/uploads/{upload_id} says why it failed.",
        )
    if upload.direct:
        return upload.name, direct_uploads.fetch(upload, announced, work)
    return upload.name, StagedFile(staging.upload_path(upload_id), str(upload.sha256), upload.size)


def _digest_staged(database: Database, staging: Staging, state: UploadState) -> str:
    """The sha256 of what lies in staging, from where the running digest ends; with a wrong one the upload is removed."""
    upload_id = state.upload.id
    digest, parts = _running.take(upload_id)
    offset = min(parts * state.upload.part_bytes, state.upload.size)
    try:
        sha256 = digest_file(staging.upload_path(upload_id), digest, offset=offset)
    except FileNotFoundError:
        raise not_found(upload_id) from None
    if state.upload.sha256 not in (None, sha256):
        remove_uploads(database, staging, [upload_id])
        raise IntakeError(
            f"The bytes that arrived have sha256 {sha256}, not {state.upload.sha256}. The upload was removed.",
            code="hash_mismatch",
            hint="Check the file and its digest, and upload it again; send Content-Digest with each part.",
        )
    return sha256


def delete_upload(session: Session, staging: Staging, upload_id: str) -> None:
    """Drop an upload and its bytes."""
    gone = queries.delete_uploads(session, [upload_id])
    if not gone:
        raise not_found(upload_id)
    after_commit(session, lambda: _forget(staging, gone))


def remove_uploads(database: Database, staging: Staging, upload_ids: Sequence[str]) -> None:
    """Drop uploads and their bytes, those that still exist."""
    with database.write() as session:
        gone = queries.delete_uploads(session, upload_ids)
    _forget(staging, gone)


def use_uploads(session: Session, staging: Staging, upload_ids: Sequence[str]) -> None:
    """Take completed uploads out of the list because something was made of them; their bytes go after the commit."""
    used = queries.delete_uploads(session, upload_ids)
    if len(used) < len(upload_ids):
        raise not_found(min(set(upload_ids) - used.keys()))
    after_commit(session, lambda: _forget(staging, used))


def remove_expired_uploads(session: Session) -> int:
    """Drop uploads past their time, and what processes that died have left in staging. Returns how many. For the sweeper.

    What is in S3 goes with `direct_uploads.remove_left`: nothing here waits for a service that is away.
    """
    staging = get_staging()
    expired = queries.delete_expired_uploads(session)
    old = list(staging.stray_uploads(older_than_seconds=_STRAY_AFTER_SECONDS))
    strays = set(old) - queries.known_uploads(session, old)
    after_commit(session, lambda: _forget(staging, dict.fromkeys([*expired, *strays])))
    staging.remove_stray_work(older_than_seconds=_STRAY_WORK_AFTER_SECONDS)
    return len(expired) + len(strays)


@dataclass
class _OpenPart:
    place: PartFile
    length: int
    recorded: UploadPart | None


def _open_part(
    database: Database, staging: Staging, part: tuple[str, int], declared_length: int | None
) -> _OpenPart:
    """Find the place of a part and lock it."""
    upload_id, number = part
    with database.read() as session:
        upload = found(queries.get_upload(session, upload_id), upload_id)
    if not upload.part_bytes:
        raise _is_import(upload_id)
    if upload.direct:
        raise direct_uploads.is_direct(upload_id)
    require_part(upload, number)
    length = part_length(upload, number)
    if declared_length is not None and declared_length != length:
        raise _wrong_length(number, length, declared_length)
    place = PartFile(
        staging.upload_path(upload_id),
        offset=(number - 1) * upload.part_bytes,
        length=length,
        min_free_bytes=staging.min_free_bytes,
    )
    try:
        # Asked under the lock: another request may have recorded the part a moment ago.
        with database.read() as session:
            return _OpenPart(place, length, queries.get_part(session, upload_id, number))
    except BaseException:
        place.close()
        raise


def _record_part(database: Database, row: UploadPart) -> None:
    """Record a part, unless the upload went away while it came in."""
    with database.write() as session:
        upload = found(queries.get_upload_for_change(session, row.upload_id), row.upload_id)
        require_open(upload)
        queries.add_part(session, row)


def _forget(staging: Staging, gone: Mapping[str, str | None]) -> None:
    """Remove the bytes of uploads, given with S3's names of those that were begun there."""
    for upload_id in gone:
        _running.take(upload_id)
        staging.upload_path(upload_id).unlink(missing_ok=True)
    direct_uploads.forget({upload_id: begun for upload_id, begun in gone.items() if begun is not None})


def _is_import(upload_id: str) -> Conflict:
    return Conflict(
        f"Upload {upload_id} is an import: the service fetches and completes it.",
        code="upload_is_import",
        hint=f"GET /v1/uploads/{upload_id} says how far it is.",
    )


def _wrong_length(number: int, length: int, got: int) -> ModelpressError:
    error = PayloadTooLarge if got > length else InvalidRequest
    return error(f"Part {number} must have {length} bytes, not {got}.", code="part_length", hint=_RESEND)


def _wrong_digest(number: int) -> InvalidRequest:
    return InvalidRequest(
        f"Part {number} arrived with another sha256 than its Content-Digest says.",
        code="digest_mismatch",
        hint=_RESEND,
    )
