"""Files as responses: ranges, validators and digests for blobs; several of them as one tar."""

from __future__ import annotations

import base64
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal
from urllib.parse import quote

from fastapi.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Receive, Scope, Send

from app.api.problems import render
from app.db.tables import Artifact
from app.errors import RangeNotSatisfiable
from app.storage import get_store

# Each chunk is one hop to a thread: at 64 KiB, Starlette's default, the hops cost more than the reading.
_CHUNK_BYTES = 2**20
_BLOCK = tarfile.BLOCKSIZE
# RFC 9110, 15.4.5: what the 200 would have said of the file and of how it was chosen.
_OF_304 = ("etag", "cache-control", "vary", "repr-digest")
# Reports are made of what users named and uploaded: a page of them may run no script but its own and load nothing.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; sandbox allow-scripts"


class BlobResponse(Response):
    """The bytes of an artifact. One range is served as asked; several, or a range we do not understand, as the whole.

    They come from the file, from a presigned URL the client is sent to, or through us, as the store has it.
    """

    def __init__(
        self, artifact: Artifact, method: str, *, inline: bool = False, varies: bool = False
    ) -> None:
        """`inline`: shown in the browser under our own policy, so never from elsewhere. `varies`: the same URL answers
        with another artifact for another `Accept`."""
        digest = base64.b64encode(bytes.fromhex(artifact.sha256)).decode()
        self.size = artifact.bytes
        super().__init__(
            media_type=artifact.media_type,
            headers={
                "ETag": f'"{artifact.sha256}"',
                "Repr-Digest": f"sha-256=:{digest}:",
                "Cache-Control": "private, no-cache" if varies else "private, max-age=31536000, immutable",
                **({"Vary": "Accept"} if varies else {}),
                "Content-Disposition": _disposition(artifact.path, inline=inline),
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": _REPORT_POLICY,
            },
        )
        del self.headers["content-length"]
        self.source = self._source(artifact, "HEAD" if method == "HEAD" else "GET", inline=inline)

    def _source(self, artifact: Artifact, method: Literal["GET", "HEAD"], *, inline: bool) -> Response:
        """Where the bytes come from. Raises NotFound (`blob_missing`)."""
        store = get_store()
        path = store.path_of(artifact.sha256)
        if path is not None:
            return _File(path, headers=dict(self.headers))
        shown = {"media_type": artifact.media_type, "disposition": self.headers["content-disposition"]}
        url = None if inline else store.url_of(artifact.sha256, method=method, **shown)
        if url is None:
            return _Stored(store.open(artifact.sha256), artifact.bytes, dict(self.headers))
        return RedirectResponse(url, status_code=307, headers={"Cache-Control": "private, no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 304, 416, 307, 206 or 200."""
        headers = Headers(scope=scope)
        if _matches(headers.get("if-none-match"), self.headers["etag"]):
            kept = {k: self.headers[k] for k in _OF_304 if k in self.headers}
            await Response(status_code=304, headers=kept)(scope, receive, send)
            return
        # If-Range comes first (RFC 9110, 13.2.2): of another file than the client has, no range of it is asked.
        counts = scope["method"] == "GET" and headers.get("if-range") in (None, self.headers["etag"])
        try:
            wanted = parse_range(headers.get("range"), self.size) if counts else None
        except RangeNotSatisfiable as error:
            await render(error, {"Content-Range": f"bytes */{self.size}"})(scope, receive, send)
            return
        if wanted is None and "range" in headers:
            without = MutableHeaders(raw=[pair for pair in scope["headers"] if pair[0].lower() != b"range"])
            scope = {**scope, "headers": without.raw}
        await self.source(scope, receive, send)


class _File(FileResponse):
    chunk_size = _CHUNK_BYTES


class _Stored(Response):
    """A blob that is read through the store, in one range of it that exists or whole."""

    def __init__(self, file: BinaryIO, size: int, headers: dict[str, str]) -> None:
        super().__init__()
        self.file, self.size, self.blob_headers = file, size, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = Headers(scope=scope)
        same = wanted.get("if-range") in (None, self.blob_headers["etag"])
        ranged = parse_range(wanted.get("range"), self.size) if same else None
        start, end = ranged or (0, self.size)
        headers = self.blob_headers | {"accept-ranges": "bytes", "content-length": str(end - start)}
        if ranged:
            headers["content-range"] = f"bytes {start}-{end - 1}/{self.size}"
        chunks = _chunks(self.file, start, end) if scope["method"] == "GET" else iter(())
        status = 206 if ranged else 200
        await StreamingResponse(chunks, status_code=status, headers=headers)(scope, receive, send)


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while chunk := file.read(min(_CHUNK_BYTES, end - file.tell())):
            yield chunk


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last, of a `Range` header; None when the whole is to be sent.

    Raises RangeNotSatisfiable when no byte of it exists.
    """
    unit, _, wanted = (header or "").partition("=")
    first, dash, last = wanted.strip().partition("-")
    numbers = all(n.isascii() and n.isdigit() for n in (first, last) if n)
    if unit.strip().lower() != "bytes" or not dash or not numbers or not (first or last):
        return None
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        raise RangeNotSatisfiable(f"The file has {size} bytes.", hint="Ask for bytes that exist.")
    return start, end


def tar_response(artifacts: Sequence[Artifact], *, root: str, mtime: float) -> StreamingResponse:
    """All files in one uncompressed tar below `root`, straight from the store, with its exact length."""
    headers = [_tar_header(artifact, root, int(mtime)) for artifact in artifacts]
    length = sum(map(len, headers)) + sum(_padded(a.bytes) for a in artifacts) + 2 * _BLOCK
    return StreamingResponse(
        _tar_chunks(artifacts, headers),
        media_type="application/x-tar",
        headers={
            "Content-Length": str(length),
            "Content-Disposition": _disposition(f"{root}.tar", inline=False),
        },
    )


def _tar_chunks(artifacts: Sequence[Artifact], headers: Sequence[bytes]) -> Iterator[bytes]:
    store = get_store()
    for artifact, header in zip(artifacts, headers, strict=True):
        yield header
        with store.open(artifact.sha256) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
        yield b"\0" * (_padded(artifact.bytes) - artifact.bytes)
    yield b"\0" * (2 * _BLOCK)


def _tar_header(artifact: Artifact, root: str, mtime: int) -> bytes:
    info = tarfile.TarInfo(f"{root}/{artifact.path}")
    info.size, info.mtime, info.mode = artifact.bytes, mtime, 0o644
    return info.tobuf(format=tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _matches(if_none_match: str | None, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in tags or "*" in tags


def _disposition(path: str, *, inline: bool) -> str:
    """RFC 6266: a plain name for old clients, the true one in UTF-8; never a directory or a quote."""
    name = path.rsplit("/", 1)[-1]
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in name)
    kind = "inline" if inline else "attachment"
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
