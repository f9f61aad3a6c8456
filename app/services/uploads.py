"""Uploads: a file comes in part by part, in any order, and is checked as a whole when it is complete.

Parts take minutes and a transaction must not, so what receives bytes opens its own short sessions on the database
instead of being given one. A recorded part never changes: sending it again compares it with what is there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.db import import_queries
from app.db import model_queries as queries
from app.db.engine import Database, after_commit
from app.db.tables import Import, Upload, UploadPart
from app.errors import Conflict, IntakeError, InvalidRequest, ModelpressError, NotFound, PayloadTooLarge
from app.ids import new_id
from app.services.quotas import require_storage
from app.settings import Settings
from app.storage import get_staging
from app.storage.parts import PartFile, RunningDigests, create_file, digest_file, pump
from app.storage.staging import Staging

_RESEND = "Send this part again."
_STRAY_AFTER_SECONDS = 3600.0
_STRAY_WORK_AFTER_SECONDS = 2 * 86_400.0

_running = RunningDigests()


@dataclass(frozen=True)
class UploadState:
    """An upload and the parts of it that have arrived, or how its import gets on."""

    upload: Upload
    parts: Sequence[UploadPart]
    fetch: Import | None = None

    @property
    def part_count(self) -> int:
        """How many parts the whole has."""
        return part_count(self.upload)

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that have not arrived."""
        there = {part.number for part in self.parts}
        return [number for number in range(1, self.part_count + 1) if number not in there]


def part_count(upload: Upload) -> int:
    """How many parts an upload has; none if it is an import."""
    return -(-upload.size // upload.part_bytes) if upload.part_bytes else 0


def part_length(upload: Upload, number: int) -> int:
    """Bytes of part `number`, from 1."""
    return min(upload.part_bytes, upload.size - (number - 1) * upload.part_bytes)


def create_upload(
    session: Session, staging: Staging, settings: Settings, *, name: str, size: int, sha256: str | None
) -> UploadState:
    """Open an upload of `size` bytes. Raises PayloadTooLarge, QuotaExceeded and StorageFull before a byte is sent."""
    if size > settings.max_upload_bytes:
        raise PayloadTooLarge(
            f"{name} has {size} bytes; this service takes files of up to {settings.max_upload_bytes}.",
            hint="Ask the administrator to raise MODELPRESS_MAX_UPLOAD_BYTES.",
        )
    upload = Upload(
        id=new_id("upl"), name=name, size=size, sha256=sha256, part_bytes=settings.part_bytes, status="open"
    )
    require_storage(session, size)
    staging.require_free(size)
    queries.add_upload(session, upload, expires_in_seconds=settings.upload_expiry_seconds)
    create_file(staging.upload_path(upload.id), size, staging.min_free_bytes)
    return UploadState(upload, ())


def get_upload(session: Session, upload_id: str) -> UploadState:
    """An upload and what has arrived of it."""
    upload = _found(queries.get_upload(session, upload_id), upload_id)
    if not upload.part_bytes:
        return UploadState(upload, (), import_queries.get_import(session, upload_id))
    return UploadState(upload, queries.list_parts(session, upload_id))


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

    Raises Conflict (`upload_incomplete`) and, when the digest is wrong, IntakeError (`hash_mismatch`): the upload is
    then removed.
    """
    with database.read() as session:
        state = get_upload(session, upload_id)
    if state.upload.status == "completed":
        return state
    if state.fetch is not None:
        raise _is_import(upload_id)
    if state.missing:
        raise _incomplete(state)
    digest, parts = _running.take(upload_id)
    offset = min(parts * state.upload.part_bytes, state.upload.size)
    try:
        sha256 = digest_file(staging.upload_path(upload_id), digest, offset=offset)
    except FileNotFoundError:
        raise _not_found(upload_id) from None
    if state.upload.sha256 not in (None, sha256):
        remove_uploads(database, staging, [upload_id])
        raise IntakeError(
            f"The bytes that arrived have sha256 {sha256}, not {state.upload.sha256}. The upload was removed.",
            code="hash_mismatch",
            hint="Check the file and its digest, and upload it again; send Content-Digest with each part.",
        )
    with database.write() as session:
        queries.complete_upload(
            session, upload_id, sha256=sha256, expires_in_seconds=settings.upload_expiry_seconds
        )
    with database.read() as session:
        return get_upload(session, upload_id)


def delete_upload(session: Session, staging: Staging, upload_id: str) -> None:
    """Drop an upload and its bytes."""
    if not queries.delete_uploads(session, [upload_id]):
        raise _not_found(upload_id)
    after_commit(session, lambda: _forget(staging, [upload_id]))


def remove_uploads(database: Database, staging: Staging, upload_ids: Sequence[str]) -> None:
    """Drop uploads and their bytes, those that still exist."""
    with database.write() as session:
        queries.delete_uploads(session, upload_ids)
    _forget(staging, upload_ids)


def use_uploads(session: Session, staging: Staging, upload_ids: Sequence[str]) -> None:
    """Take completed uploads out of the list because something was made of them; their bytes go after the commit."""
    gone = set(upload_ids) - queries.delete_uploads(session, upload_ids)
    if gone:
        raise _not_found(min(gone))
    after_commit(session, lambda: _forget(staging, upload_ids))


def remove_expired_uploads(session: Session) -> int:
    """Drop uploads past their time, and what processes that died have left in staging. Returns how many. For the sweeper."""
    staging = get_staging()
    expired = queries.delete_expired_uploads(session)
    old = list(staging.stray_uploads(older_than_seconds=_STRAY_AFTER_SECONDS))
    strays = set(old) - queries.known_uploads(session, old)
    after_commit(session, lambda: _forget(staging, [*expired, *strays]))
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
        upload = _found(queries.get_upload(session, upload_id), upload_id)
    if not upload.part_bytes:
        raise _is_import(upload_id)
    if not 1 <= number <= part_count(upload):
        raise InvalidRequest(
            f"Upload {upload_id} has parts 1 to {part_count(upload)}; there is no part {number}.",
            code="no_such_part",
        )
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
        upload = _found(queries.get_upload_for_change(session, row.upload_id), row.upload_id)
        if upload.status != "open":
            raise Conflict(f"Upload {upload.id} is {upload.status}.", code="upload_completed")
        queries.add_part(session, row)


def _forget(staging: Staging, upload_ids: Sequence[str]) -> None:
    for upload_id in upload_ids:
        _running.take(upload_id)
        staging.upload_path(upload_id).unlink(missing_ok=True)


def _found(upload: Upload | None, upload_id: str) -> Upload:
    if upload is None:
        raise _not_found(upload_id)
    return upload


def _not_found(upload_id: str) -> NotFound:
    return NotFound(
        f"There is no upload {upload_id}: it was never made, was used or deleted, or has expired.",
        hint="Start a new one with POST /v1/uploads.",
    )


def _is_import(upload_id: str) -> Conflict:
    return Conflict(
        f"Upload {upload_id} is an import: the service fetches and completes it.",
        code="upload_is_import",
        hint=f"GET /v1/uploads/{upload_id} says how far it is.",
    )


def _incomplete(state: UploadState) -> Conflict:
    missing = state.missing
    shown = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
    return Conflict(
        f"{len(missing)} of {state.part_count} parts are missing: {shown}.",
        code="upload_incomplete",
        hint="Send them and complete the upload again.",
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
