"""Raw bodies, of calls and of answers: how they are described; how a call's are read, and checked against their digest."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Header, Request
from pydantic import StringConstraints

from app.errors import InvalidRequest

_SHA256 = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([A-Za-z0-9+/=]+):")

RAW_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes themselves, as they are.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
# The bytes that the example of POST /v1/uploads announces can be sent without a file at hand.
RAW_PART = {
    "requestBody": {
        "required": True,
        "description": "The bytes themselves, as they are.",
        "content": {
            "text/plain": {"schema": {"type": "string"}, "example": "Hello there."},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
RAW_TEXT = {
    "requestBody": {
        "required": True,
        "description": "The text itself, as it is.",
        "content": {
            "text/plain": {
                "schema": {"type": "string"},
                "example": "The first document.\n\nThe second document.\nIt has two lines.\n",
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}

# What a stored file is answered with beside the whole of it.
RANGE_ANSWERS: dict[int | str, dict[str, Any]] = {
    206: {"description": "The bytes of the `Range` that was asked for."},
    304: {"description": "You have it already (`If-None-Match`)."},
}
_IN_S3: dict[int | str, dict[str, Any]] = {
    307: {
        "description": "The file is in S3: ask the URL in `Location`, good for minutes, without your credentials."
    }
}
FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file. `ETag` and `Repr-Digest` carry its sha256.",
        # A report is JSON, weights are bytes: the type is the file's.
        "content": {"*/*": {}},
    },
    **RANGE_ANSWERS,
    **_IN_S3,
}
HEAD_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The headers that GET would answer with."},
    304: RANGE_ANSWERS[304],
    **_IN_S3,
}

# White space around it is left out.
FILE_NAME_PATTERN = r"^[^/\\\x00-\x1f\x7f]*[^/\\\x00-\x1f\x7f\s][^/\\\x00-\x1f\x7f]*$"
FileName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=255, pattern=FILE_NAME_PATTERN, strip_whitespace=True),
]
ContentDigest = Annotated[
    str | None,
    Header(
        description="sha256 of the body's bytes, `sha-256=:<base64>:` (RFC 9530). Checked before the body counts.",
        # `parse_digest` refuses others, in words of its own.
        json_schema_extra={"pattern": r"sha-256=:[A-Za-z0-9+/]{43}=:"},
    ),
]


async def chunks_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises InvalidRequest (`body_cut`) when the connection breaks."""
    # The same as request.stream(), without its second generator: this loop turns four times for every MiB.
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("The connection broke before the body was there.", code="body_cut")
        more = message.get("more_body", False)
        yield message.get("body", b"")


def declared_length(request: Request) -> int | None:
    """The Content-Length; None for a body of unknown length."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def parse_digest(header: str | None) -> bytes | None:
    """The sha256 in a Content-Digest header; None where there is no header."""
    if header is None:
        return None
    found = _SHA256.search(header)
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        raise InvalidRequest(
            "Content-Digest carries no sha256 that can be read.",
            code="digest_unreadable",
            hint="Send `Content-Digest: sha-256=:<base64 of the 32 bytes>:` (RFC 9530), or leave it out.",
        )
    return digest
