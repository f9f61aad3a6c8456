"""Fetches what imports by URL ask for, whatever dies in between: the network, the other server, or this process.

Any number of processes may do so at once on one data directory. An import is leased, and its file locked; whoever comes
after one that died goes on behind the last byte that is known to be on the disk, where the server can tell that its file
is still the same, and from the start where it cannot.
"""

from __future__ import annotations

import random
import threading
import time
from http import HTTPStatus
from typing import Any

import structlog

from app import outbound
from app.addresses import Refused, Unanswered
from app.db import import_queries as queries
from app.db.engine import Database
from app.db.import_queries import Claim
from app.errors import IntakeError, ModelpressError, PayloadTooLarge, Unavailable
from app.outbound import Incoming, Patience
from app.services.import_answers import Busy, body_bytes, check_answer, strong_etag, unanswered
from app.services.quotas import require_storage
from app.services.url_imports import shown_url
from app.settings import Settings
from app.storage import get_staging
from app.storage.growing_file import GrowingFile

WAITS = (2.0, 10.0, 30.0, 120.0, 600.0)
"""Seconds from each attempt to the next; one that got on by a step counts as the first."""
_JITTER = 0.1
_STEP_BYTES = 64 * 2**20

_log = structlog.get_logger(__name__)


class _Lost(Exception):  # noqa: N818 - an outcome
    """The import was dropped, or somebody else holds it."""


class _Stopped(Exception):  # noqa: N818
    """This process is to leave."""


class Attempt:
    """One attempt at an import that was claimed, whose file is open."""

    def __init__(
        self, database: Database, settings: Settings, claim: Claim, file: GrowingFile, stop: threading.Event
    ) -> None:
        self._database, self._settings, self._stop = database, settings, stop
        self._claim, self._file = claim, file
        self._left = settings.import_timeout_seconds - claim.age_seconds
        self._until = time.monotonic() + self._left
        self._next_beat = time.monotonic() + settings.heartbeat_seconds
        self._total, self._etag = claim.total, claim.etag
        self._reserved, self._room = claim.reserved, 0

    def run(self) -> None:
        """Fetch what is missing and end the import, or give it back."""
        with self._file:
            try:
                self._run()
            except _Lost:
                self._tell("import_dropped")
            except Unavailable as error:
                # Of our own: when its lease is over, it is taken up again.
                self._tell("import_interrupted", error=error.detail)
            except Exception:  # noqa: BLE001 - logged with its trace
                _log.exception("import_interrupted", upload=self._claim.upload_id)

    def _run(self) -> None:
        try:
            self._check_patience()
            self._fetch()
            self._complete()
        except _Stopped:
            self._give_back(0.0, attempt=self._attempt() - 1)
        except Refused as error:
            self._fail(IntakeError(str(error), code="import_refused"))
        except Unanswered as error:
            self._again_or_fail(error)
        except Unavailable:
            raise
        except ModelpressError as error:
            self._fail(error)

    def _check_patience(self) -> None:
        # One more than there are: it killed whoever tried it, with no word of why.
        if self._claim.attempt > len(WAITS) + 1:
            raise unanswered("it was broken off each time")
        if self._left <= 0:
            raise self._too_slow()

    def _fetch(self) -> None:
        claim = self._claim
        start = claim.bytes if self._file.holds(claim.bytes) and self._can_go_on() else 0
        self._file.go_on_behind(start, self._beat)
        if start and start == claim.total:
            return
        headers = {"accept-encoding": "identity", "user-agent": "modelpress-imports"}
        if start:
            headers |= {"range": f"bytes={start}-", "if-range": str(claim.etag)}
        patience = Patience(
            seconds=self._left,
            idle_seconds=self._settings.import_idle_seconds,
            allowed=self._settings.outbound_networks,
            beat=self._beat,
        )
        with outbound.get(claim.url, headers, patience) as answer:
            self._begin(answer)
            for chunk in answer.chunks:
                self._append(chunk)

    def _can_go_on(self) -> bool:
        return self._claim.etag is not None or self._claim.bytes == self._claim.total

    def _begin(self, answer: Incoming) -> None:
        """Look at what is coming, and write down what becomes of the file before it is touched."""
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and self._file.bytes:
            self._etag = None
            self._keep(etag=None)
            raise Unanswered("it has fewer bytes than before")
        start, length = check_answer(answer, self._claim.url, self._file.bytes), body_bytes(answer)
        self._total = None if length is None else start + length
        if start == 0:
            self._etag = strong_etag(answer)
        if self._total is not None:
            self._make_room(self._total)
        self._keep(total=self._total, etag=self._etag, bytes=start)
        if start != self._file.bytes:
            self._file.go_on_behind(start, self._beat)

    def _append(self, chunk: bytes) -> None:
        grown = self._file.bytes + len(chunk)
        if grown > self._room:
            self._make_room(grown)
        self._file.append(chunk)
        self._beat()

    def _make_room(self, needed: int) -> None:
        """See that so many bytes are allowed, and that they, and some more, fit on the disk and into the quota."""
        limit = self._settings.max_upload_bytes
        if needed > limit:
            raise PayloadTooLarge(
                f"The file has {needed} bytes or more; this service takes files of up to {limit}.",
                hint="Ask the administrator to raise MODELPRESS_MAX_UPLOAD_BYTES.",
            )
        room = min(needed + _STEP_BYTES, limit) if self._total is None else self._total
        get_staging().require_free(room - self._file.bytes)
        if room > self._reserved:
            with self._database.for_tenant(self._claim.tenant).write() as session:
                require_storage(session, room - self._reserved)
                if not queries.reserve(session, self._claim.upload_id, room):
                    raise _Lost
            self._reserved = room
        self._room = min(needed + _STEP_BYTES, room)

    def _beat(self) -> None:
        """Now and then say that we are at it, and how far; learn whether to go on."""
        if self._stop.is_set():
            raise _Stopped
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + self._settings.heartbeat_seconds
        try:
            self._keep(bytes=self._file.sync(), attempt=self._attempt())
        except Unavailable as error:
            self._tell("import_unheard", error=error.detail)

    def _keep(self, **values: Any) -> None:
        with self._database.write() as session:
            if not queries.keep(session, self._claim, lease_seconds=self._settings.lease_seconds, **values):
                raise _Lost

    def _attempt(self) -> int:
        """The number of this attempt: the first, if another can go on where it has come to, well ahead of the last."""
        got_on = self._etag is not None and self._file.bytes >= self._claim.bytes + _STEP_BYTES
        return 1 if got_on else self._claim.attempt

    def _complete(self) -> None:
        size, sha256 = self._file.sync(), self._file.sha256()
        if not size:
            raise IntakeError("The server sent no bytes.", code="import_empty", hint="Check the URL.")
        if self._claim.sha256 not in (None, sha256):
            raise IntakeError(
                f"The bytes that came have sha256 {sha256}, not {self._claim.sha256}. They were removed.",
                code="hash_mismatch",
                hint="Check the URL and the digest, and import it again.",
            )
        upload = {"status": "completed", "size": size, "sha256": sha256}
        self._end(upload, bytes=size, total=size, error=None)
        self._tell("import_completed", bytes=size)

    def _again_or_fail(self, error: Unanswered) -> None:
        attempt = self._attempt()
        if time.monotonic() >= self._until:
            self._fail(self._too_slow())
        elif attempt > len(WAITS):
            self._fail(unanswered(str(error)))
        else:
            # Of imports that failed together, not all come back at once.
            spread = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - nothing to guess
            wait = WAITS[attempt - 1] * spread
            if isinstance(error, Busy):
                wait = max(wait, min(error.seconds, WAITS[-1]))
            self._give_back(wait, attempt=attempt, error=_kept(unanswered(str(error))))
            self._tell("import_waits", attempt=attempt, error=str(error))

    def _give_back(self, wait: float, **values: Any) -> None:
        size = self._file.sync()
        with self._database.write() as session:
            if not queries.give_back(session, self._claim, due_in_seconds=wait, bytes=size, **values):
                raise _Lost

    def _fail(self, error: ModelpressError) -> None:
        """End the import; what came of the file goes."""
        self._end({"status": "failed", "size": 0}, error=_kept(error))
        get_staging().upload_path(self._claim.upload_id).unlink(missing_ok=True)
        self._tell("import_failed", code=error.code, error=error.detail)

    def _end(self, upload: dict[str, Any], **values: Any) -> None:
        expires = self._settings.upload_expiry_seconds
        values["url"] = shown_url(self._claim.url)
        with self._database.write() as session:
            if not queries.end(session, self._claim, upload, expires_in_seconds=expires, **values):
                raise _Lost

    def _too_slow(self) -> ModelpressError:
        return IntakeError(
            f"The file did not come within {self._settings.import_timeout_seconds:g} seconds.",
            code="import_timeout",
            hint="Import it from a faster server, upload it, or ask the administrator to raise "
            "MODELPRESS_IMPORT_TIMEOUT_SECONDS.",
        )

    def _tell(self, event: str, **more: Any) -> None:
        claim = self._claim
        _log.info(event, upload=claim.upload_id, tenant=claim.tenant, url=shown_url(claim.url), **more)


def _kept(error: ModelpressError) -> dict[str, Any]:
    # PostgreSQL keeps no NUL in a text.
    detail = error.detail.replace("\0", "")[:1000]
    return {"code": error.code, "detail": detail, "hint": error.hint}
