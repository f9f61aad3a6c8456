"""Imports by URL: uploads that the service fills itself, as `app.services.import_fetching` does.

What a URL's query says may open a door: the rest alone is shown or logged, and kept once the import has ended.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from sqlalchemy.orm import Session

from app.addresses import Refused, Unanswered, check_address
from app.db import import_queries as queries
from app.db.tables import Upload
from app.errors import Fault, InvalidRequest, TooManyRequests
from app.ids import new_id
from app.services.quotas import require_storage
from app.services.upload_states import UploadState
from app.settings import Settings
from app.storage.parts import create_file
from app.storage.staging import Staging

_MAX_UNFINISHED = 100
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f]+")


def check_source(url: str, settings: Settings) -> None:
    """Raise InvalidRequest for a URL that would not be fetched today. Resolves its name, so not within a transaction."""
    try:
        check_address(url, settings.outbound_networks)
    except Refused as error:
        raise _fault(str(error)) from None
    except Unanswered as error:
        raise _fault(f"{error}. Check its spelling.") from None
    if urlsplit(url).scheme != "https":
        raise _fault("It must be an https:// URL: nobody on the way may see or change the file.")


def create_import(
    session: Session, staging: Staging, settings: Settings, *, url: str, name: str | None, sha256: str | None
) -> UploadState:
    """Have a URL that was checked fetched as an upload. Raises TooManyRequests, QuotaExceeded and StorageFull."""
    if queries.count_unfinished(session) >= _MAX_UNFINISHED:
        raise TooManyRequests(
            f"{_MAX_UNFINISHED} imports have not ended yet.",
            code="too_many_imports",
            hint="Wait for some to end, or drop them with DELETE /v1/uploads/{id}.",
        )
    # How large it is, its server will say.
    require_storage(session, 1)
    staging.require_free(1)
    upload = Upload(
        id=new_id("upl"),
        name=name or name_in(url),
        size=0,
        sha256=sha256,
        part_bytes=0,
        status="importing",
    )
    lives = settings.import_timeout_seconds + settings.upload_expiry_seconds
    row = queries.add_import(session, upload, url, expires_in_seconds=lives)
    create_file(staging.upload_path(upload.id), 0, staging.min_free_bytes)
    return UploadState(upload, (), row)


def shown_url(url: str) -> str:
    """A URL without its query, and without a password. Raises ValueError where it is none."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def name_in(url: str) -> str:
    """What the last part of a URL's path calls the file."""
    last = unquote(urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1])
    return _NOT_IN_NAMES.sub("_", last).strip()[:255] or "import"


def _fault(detail: str) -> InvalidRequest:
    return InvalidRequest("The request has 1 fault; see `errors`.", faults=[Fault("/url", detail)])
