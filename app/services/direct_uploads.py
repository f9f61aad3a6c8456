"""Uploads whose parts clients send to S3 themselves, by URLs that we sign for them.

A part is announced with its sha256, once and for all: S3 takes no other bytes for it, and they are held against it again
when the whole is fetched, to make something of it. The row of an upload is there before S3 hears of it and goes first,
so what S3 has without one is nobody's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.orm import Session

from app.db import model_queries as queries
from app.db.engine import Database
from app.db.tables import Upload, UploadPart
from app.errors import Conflict, IntakeError, NotFound, Unavailable
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
from app.storage import get_store
from app.storage.staging import StagedFile, WorkDirectory

if TYPE_CHECKING:
    # What it is made with, the API has where blobs are in S3 alone.
    from app.storage.s3_uploads import S3Uploads, SignedPart

# What S3 demands of uploads in parts.
_MAX_PARTS = 10_000
_MIN_PART_BYTES = 5 * 2**20
_LEFT_AFTER_SECONDS = 3600.0

_log = structlog.get_logger(__name__)


def offered(settings: Settings) -> bool:
    """Whether clients may send parts to S3 themselves."""
    as_downloads = "direct" if settings.s3_downloads == "presigned" else "streamed"
    return bool(settings.store) and (settings.s3_uploads or as_downloads) == "direct"


def part_bytes(size: int, settings: Settings) -> int:
    """Bytes of every part but the last, of an upload of `size` bytes."""
    return max(settings.part_bytes, _MIN_PART_BYTES, -(-size // _MAX_PARTS))


def sign_parts(database: Database, upload_id: str, wanted: Mapping[int, str]) -> dict[int, SignedPart]:
    """Where to PUT parts, given by number with the sha256 of each. To ask again gives fresh URLs.

    Raises NotFound, InvalidRequest (`no_such_part`), and Conflict where the upload takes no parts this way or one of
    them was announced with another sha256 (`part_differs`).
    """
    with database.read() as session:
        upload = _open_upload(queries.get_upload(session, upload_id), upload_id)
    for number in wanted:
        require_part(upload, number)
    uploads = _uploads(upload_id)
    begun = upload.multipart_id or uploads.begin(upload_id)
    with database.write() as session:
        upload = _open_upload(queries.get_upload_for_change(session, upload_id), upload_id)
        kept = queries.begin_multipart(session, upload, begun)
        _announce(session, upload, wanted)
    if kept != begun:
        uploads.abort(upload_id, begun)
    return {
        number: uploads.sign(upload_id, kept, number, length=part_length(upload, number), sha256=sha256)
        for number, sha256 in wanted.items()
    }


def arrived(upload: Upload, announced: Sequence[UploadPart]) -> Sequence[UploadPart]:
    """Those of the announced parts that S3 has, whole."""
    if upload.status == "completed":
        return announced
    if upload.multipart_id is None:
        return ()
    uploads = _uploads(upload.id)
    stored = uploads.parts(upload.id, upload.multipart_id)
    if stored is not None:
        return [
            part for part in announced if part.number in stored and stored[part.number].bytes == part.bytes
        ]
    # Completed by a process that died before it could say so, or aborted by somebody else.
    _require_whole(uploads, upload)
    return announced


def assemble(state: UploadState) -> None:
    """Have S3 make one object of an upload's parts, if it has them all. Raises Conflict and NotFound."""
    upload = state.upload
    uploads = _uploads(upload.id)
    stored = uploads.parts(upload.id, str(upload.multipart_id))
    if stored is not None:
        there = {
            part.number: (stored[part.number], str(part.sha256))
            for part in state.parts
            if part.number in stored
        }
        if len(there) < state.part_count:
            raise incomplete(state)
        uploads.complete(upload.id, str(upload.multipart_id), there)
    _require_whole(uploads, upload)


def fetch(upload: Upload, announced: Sequence[UploadPart], work: WorkDirectory) -> StagedFile:
    """Fetch a completed upload, hashed on the way: each part and the whole. Raises NotFound and IntakeError."""
    uploads = _uploads(upload.id)
    work.require_free(upload.size)
    parts = _PartDigests(announced)
    with work.writer(f"uploads/{upload.id}") as writer:
        try:
            for piece in uploads.fetch(upload.id, upload.size):
                parts.update(piece)
                writer.write(piece)
        except NotFound:
            raise not_found(upload.id) from None
        staged = writer.close()
    if parts.wrong or upload.sha256 not in (None, staged.sha256):
        what = f"part {parts.wrong[0]} of what S3 has is another" if parts.wrong else f"not {upload.sha256}"
        raise IntakeError(
            f"What was uploaded has sha256 {staged.sha256}: {what}. The upload was removed.",
            code="hash_mismatch",
            hint="Check the file and its digest, and upload it again.",
        )
    return staged


def forget(multiparts: Mapping[str, str]) -> None:
    """Remove from S3 uploads whose rows are gone, given with S3's names; the rest is left for the sweeper if S3 is away."""
    uploads = get_store().direct_uploads
    if uploads is None:
        return
    try:
        for upload_id, multipart_id in multiparts.items():
            uploads.remove(upload_id, multipart_id)
    except Unavailable as error:
        _log.warning("uploads_left", count=len(multiparts), error=error.detail)


def remove_left(database: Database, *, older_than_seconds: float = _LEFT_AFTER_SECONDS) -> int:
    """Remove what S3 has of uploads that have expired or whose process died. Returns how many. For the sweeper."""
    uploads = get_store().direct_uploads
    if uploads is None:
        return 0
    begun = list(uploads.begun(older_than_seconds=older_than_seconds))
    completed = list(uploads.completed(older_than_seconds=older_than_seconds))
    # Asked last: a row that is not there now was gone when S3 was listed.
    with database.read() as session:
        known = queries.multiparts_of(session, {*completed, *(upload_id for upload_id, _ in begun)})
    aborted = [pair for pair in begun if known.get(pair[0]) != pair[1]]
    deleted = [upload_id for upload_id in completed if upload_id not in known]
    for upload_id, multipart_id in aborted:
        uploads.abort(upload_id, multipart_id)
    for upload_id in deleted:
        uploads.delete(upload_id)
    return len(aborted) + len(deleted)


def is_direct(upload_id: str) -> Conflict:
    """For a part that came to us instead."""
    return Conflict(
        f"The parts of upload {upload_id} go to S3.",
        code="upload_is_direct",
        hint=f"POST /v1/uploads/{upload_id}/part-urls says where. An upload that is not `direct` takes parts here.",
    )


class _PartDigests:
    """Holds a stream against the sha256 of its parts."""

    def __init__(self, parts: Sequence[UploadPart]) -> None:
        self.wrong: list[int] = []
        self._parts = iter(parts)
        self._next()

    def update(self, piece: bytes) -> None:
        """Take the next bytes of the whole, of which there are no more than the parts have."""
        rest = memoryview(piece)
        while rest:
            taken, rest = rest[: self._left], rest[self._left :]
            self._digest.update(taken)
            self._left -= len(taken)
            if not self._left:
                if self._digest.hexdigest() != self._part.sha256:
                    self.wrong.append(self._part.number)
                self._next()

    def _next(self) -> None:
        self._digest = hashlib.sha256()
        part = next(self._parts, None)
        if part is not None:
            self._part, self._left = part, part.bytes


def _uploads(upload_id: str) -> S3Uploads:
    uploads = get_store().direct_uploads
    if uploads is None:
        # The service had its store in S3 when the upload was made.
        raise not_found(upload_id)
    return uploads


def _open_upload(upload: Upload | None, upload_id: str) -> Upload:
    """An upload that takes announcements."""
    upload = found(upload, upload_id)
    if not upload.direct:
        raise Conflict(
            f"The parts of upload {upload_id} do not go to S3.",
            code="upload_not_direct",
            hint=f"PUT them to /v1/uploads/{upload_id}/parts/{{number}}.",
        )
    require_open(upload)
    return upload


def _announce(session: Session, upload: Upload, wanted: Mapping[int, str]) -> None:
    """Write down the sha256 of parts. Raises Conflict (`part_differs`) where one has another."""
    known = {part.number: part.sha256 for part in queries.parts_among(session, upload.id, wanted.keys())}
    for number, sha256 in wanted.items():
        if known.get(number, sha256) != sha256:
            raise Conflict(
                f"Part {number} was announced with sha256 {known[number]}.",
                code="part_differs",
                hint="If the file has changed, delete this upload and start a new one.",
            )
    queries.add_parts(
        session,
        [
            UploadPart(upload_id=upload.id, number=number, bytes=part_length(upload, number), sha256=sha256)
            for number, sha256 in wanted.items()
            if number not in known
        ],
    )


def _require_whole(uploads: S3Uploads, upload: Upload) -> None:
    """Raise NotFound unless S3 has the whole of it as one object."""
    if uploads.size(upload.id) != upload.size:
        raise not_found(upload.id)
