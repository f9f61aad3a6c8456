"""What servers answer to an import: which answers are the file, which may pass, and which are final, with what to do."""

from __future__ import annotations

import re
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

from app.addresses import Unanswered
from app.errors import IntakeError
from app.outbound import Incoming
from app.services.url_imports import shown_url

_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)", re.ASCII)
_STRONG_ETAG = re.compile(r'"[!#-~]{1,500}"')
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_ELSEWHERE = "Import it from another server, or upload it."


class Busy(Unanswered):
    """The server asks to come back later."""

    def __init__(self, detail: str, seconds: float) -> None:
        super().__init__(detail)
        self.seconds = seconds
        """How much later, as far as it says so."""


def check_answer(answer: Incoming, url: str, asked: int) -> int:
    """Where in the file the answer begins: at byte `asked`, or at 0. Raises Busy, and IntakeError where it is no file."""
    if answer.status in _REDIRECTS:
        raise _redirected(url, answer.headers.get("location", ""))
    said = _status_words(answer.status)
    if answer.status in _MAY_PASS:
        raise Busy(f"the server answered {said}", float(_number(answer, "retry-after") or 0))
    if answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        raise _no_file(
            f"{urlsplit(url).hostname} answered {said}.",
            "Check that the URL can be opened without logging in and, if it is signed, that it has not expired.",
        )
    encoding = answer.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise _no_file(
            f"The server sends the file encoded ({encoding[:20]!r}), although asked not to.", _ELSEWHERE
        )
    if answer.status == HTTPStatus.OK:
        return 0
    found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
    if found is None or not asked or int(found[1]) != asked:
        raise _no_file("The server sent another part of the file than was asked for.", _ELSEWHERE)
    return asked


def body_bytes(answer: Incoming) -> int | None:
    """Bytes of the answer's body; None where the server does not say."""
    return _number(answer, "content-length")


def strong_etag(answer: Incoming) -> str | None:
    """The ETag that two answers have alone if all their bytes are the same."""
    etag = answer.headers.get("etag", "")
    return etag if _STRONG_ETAG.fullmatch(etag) else None


def unanswered(reason: str) -> IntakeError:
    """The error for a file that did not come."""
    return IntakeError(
        f"The file did not come whole: {reason}.",
        code="import_unanswered",
        hint="Check that the server is up and the URL right, then import it again; or upload the file.",
    )


def _redirected(url: str, location: str) -> IntakeError:
    try:
        target = shown_url(re.sub(r"[^!-~]", "", urljoin(url, location)))[:500]
    except ValueError:
        target = "what is no URL"
    return IntakeError(
        f"The server sends us on to {target}; redirects are not followed.",
        code="import_redirected",
        hint="If you trust that address, import it instead. Its query is not shown here; `curl -sI URL` shows it whole.",
    )


def _no_file(detail: str, hint: str) -> IntakeError:
    return IntakeError(detail, code="import_answer", hint=hint)


def _number(answer: Incoming, header: str) -> int | None:
    text = answer.headers.get(header, "")
    return int(text) if _NUMBER.fullmatch(text) else None


def _status_words(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
