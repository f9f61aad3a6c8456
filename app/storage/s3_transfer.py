"""Bytes to and from S3: several pieces at once, in bounded memory, each tried again by itself when a connection breaks.

`where` names an object in all of these: its `Bucket` and `Key`.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from app.errors import Unavailable
from app.storage.s3_client import translated
from app.storage.store import Beat

PIECE_BYTES = 8 * 2**20
_AT_ONCE = 4
_MAX_PARTS = 10_000
_ATTEMPTS = 5
_BEAT_SECONDS = 1.0
# What breaks while a body is read; what breaks before that, the client itself tries again.
_BROKEN = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)

T = TypeVar("T")


def put_small(client: Any, where: dict[str, str], path: Path, sha256: str) -> None:
    """Put a file of at most PIECE_BYTES."""
    content = path.read_bytes()
    _require_digest(hashlib.sha256(content), sha256)
    client.put_object(**where, Body=content)


def put_large(client: Any, where: dict[str, str], path: Path, sha256: str, beat: Beat) -> None:
    """Put a file in parts. The object appears when the last is there and all of them together have this sha256."""
    upload = where | {"UploadId": client.create_multipart_upload(**where)["UploadId"]}
    digest = hashlib.sha256()
    try:
        parts = list(_in_order(_part_calls(client, upload, path, digest), beat))
        _require_digest(digest, sha256)
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    except BaseException:
        # Where this fails too, the sweeper does it a day later.
        with suppress(ClientError, BotoCoreError):
            client.abort_multipart_upload(**upload)
        raise


def fetch(client: Any, where: dict[str, str], start: int, end: int) -> bytes:
    """The bytes from `start` up to `end` of an object."""
    for attempt in range(1, _ATTEMPTS + 1):
        answer = client.get_object(**where, Range=f"bytes={start}-{end - 1}")
        try:
            return bytes(answer["Body"].read())
        except _BROKEN:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def fetch_all(client: Any, where: dict[str, str], size: int, beat: Beat) -> Iterator[bytes]:
    """All of an object of `size` bytes, in order, while the next pieces are on their way."""
    starts = range(0, size, PIECE_BYTES)
    return _in_order((partial(fetch, client, where, at, min(size, at + PIECE_BYTES)) for at in starts), beat)


class ObjectReader(io.RawIOBase):
    """An object of `size` bytes as a file to read from, at any place of it; each read is one request."""

    def __init__(self, client: Any, where: dict[str, str], size: int) -> None:
        self._client, self._where, self._size = client, where, size
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; costs nothing."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from where we are. 0: the end."""
        end = min(self._size, self._at + len(buffer))
        if end <= self._at:
            return 0
        with translated(self._where["Bucket"]):
            content = fetch(self._client, self._where, self._at, end)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _part_calls(
    client: Any, upload: dict[str, str], path: Path, digest: hashlib._Hash
) -> Iterator[Callable[[], dict[str, Any]]]:
    """One call for each part of a file, read and hashed when its turn comes."""
    with path.open("rb") as file:
        size = max(PIECE_BYTES, -(-path.stat().st_size // _MAX_PARTS))
        for number, content in enumerate(iter(partial(file.read, size), b""), 1):
            digest.update(content)
            yield partial(_send_part, client, upload, number, content)


def _send_part(client: Any, upload: dict[str, str], number: int, content: bytes) -> dict[str, Any]:
    answer = client.upload_part(**upload, PartNumber=number, Body=content)
    return {"PartNumber": number, "ETag": answer["ETag"]}


def _in_order(calls: Iterable[Callable[[], T]], beat: Beat) -> Iterator[T]:
    """What the calls return, in their order, with a few of them under way at once."""
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="s3")
    under_way: deque[Future[T]] = deque()
    try:
        for call in calls:
            under_way.append(pool.submit(call))
            if len(under_way) == _AT_ONCE:
                yield _result(under_way.popleft(), beat)
        while under_way:
            yield _result(under_way.popleft(), beat)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[T], beat: Beat) -> T:
    while not wait((future,), timeout=_BEAT_SECONDS).done:
        beat()
    beat()
    return future.result()


def _require_digest(digest: hashlib._Hash, sha256: str) -> None:
    if digest.hexdigest() != sha256:
        raise Unavailable(
            f"A file had sha256 {sha256} and had another when it was put into the store.",
            code="file_changed",
            hint="Try again; if it happens again, have the disk of this machine checked.",
        )
