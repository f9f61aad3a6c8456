"""The file an upload is written into, part by part, in any order and from any number of processes.

A part's range is locked while it is written, and the caller writes no range twice, so bytes that were once
recorded never change; that is what lets a digest be trusted that was taken while they came in.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from app.errors import Conflict, InvalidRequest, NotFound, PayloadTooLarge
from app.storage.disk import full_disk_translated, require_free

# Large enough that the hop to a thread costs nothing, small enough that a hundred uploads fit in memory.
_BATCH_BYTES = 2**20
# A client that sends nothing for so long is gone, though its connection may not know it.
_IDLE_SECONDS = 60
_IOV_MAX = 1024
_READ_BYTES = 2**20


def create_file(path: Path, size: int, min_free_bytes: int) -> None:
    """Make the sparse file of an upload."""
    require_free(path.parent, size, min_free_bytes)
    with full_disk_translated(), path.open("xb") as file:
        file.truncate(size)


@dataclass
class RunningDigest:
    """The sha256 of the first parts of an upload, advanced while each next part arrives in order."""

    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    parts: list[str] = field(default_factory=list)
    """Digest of each part that went in, from the first on."""


class RunningDigests:
    """The running digests of this process. A hint: what is not here is read again when the upload completes."""

    def __init__(self, capacity: int = 1024) -> None:
        self._by_upload: dict[str, RunningDigest] = {}
        self._capacity = capacity
        self._lock = threading.Lock()

    def fork(self, upload_id: str, number: int) -> hashlib._Hash | None:
        """A copy to feed part `number` (from 1) into; None when an earlier part has not gone in."""
        with self._lock:
            if number == 1 and upload_id not in self._by_upload:
                if len(self._by_upload) >= self._capacity:
                    del self._by_upload[next(iter(self._by_upload))]
                self._by_upload[upload_id] = RunningDigest()
            running = self._by_upload.get(upload_id)
            return running.digest.copy() if running and len(running.parts) == number - 1 else None

    def advance(self, upload_id: str, number: int, digest: hashlib._Hash, part_sha256: str) -> None:
        """Keep a fork into which part `number` went whole, once the part is recorded."""
        with self._lock:
            running = self._by_upload.get(upload_id)
            if running and len(running.parts) == number - 1:
                running.digest = digest
                running.parts.append(part_sha256)

    def take(self, upload_id: str, recorded: Sequence[str]) -> tuple[hashlib._Hash, int]:
        """Remove and return a digest and the number of parts in it, if they are the recorded ones; else a fresh one."""
        with self._lock:
            running = self._by_upload.pop(upload_id, None)
        if running and running.parts == list(recorded[: len(running.parts)]):
            return running.digest, len(running.parts)
        return hashlib.sha256(), 0

    def forget(self, upload_id: str) -> None:
        """Drop what is known of an upload that is no more."""
        with self._lock:
            self._by_upload.pop(upload_id, None)


class PartWriter:
    """Writes one part to its place and holds the lock on its range until closed. Not for several threads at once."""

    def __init__(self, path: Path, *, offset: int, length: int, min_free_bytes: int) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY)
        except (FileNotFoundError, PermissionError):
            raise NotFound("The upload is gone: it was used, deleted, or has expired.") from None
        try:
            _lock_range(self._file, offset, length)
        except BaseException:
            os.close(self._file)
            raise
        self._directory = path.parent
        self._min_free = min_free_bytes
        self._offset = offset
        self._left = length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)

    def write(self, chunks: Sequence[bytes]) -> None:
        """Write chunks behind those before."""
        size = sum(map(len, chunks))
        if size > self._left:
            raise InvalidRequest("The part is longer than its place in the upload.", code="part_length")
        require_free(self._directory, size, self._min_free)
        with full_disk_translated():
            for start in range(0, len(chunks), _IOV_MAX):
                self._write_vector(list(chunks[start : start + _IOV_MAX]))
        self._left -= size

    def _write_vector(self, chunks: list[bytes]) -> None:
        while chunks:
            written = os.pwritev(self._file, chunks, self._offset)
            self._offset += written
            while chunks and written >= len(chunks[0]):
                written -= len(chunks.pop(0))
            if written:
                chunks[0] = chunks[0][written:]


async def pump(
    chunks: AsyncIterator[bytes], consume: Callable[[Sequence[bytes]], None], *, limit: int
) -> int:
    """Hand the chunks to `consume` in batches, in a thread, while the next batch arrives. Returns the bytes.

    Raises PayloadTooLarge past `limit` bytes, InvalidRequest (`body_stalled`) when nothing comes for a minute, and
    whatever `consume` raises. When this returns or raises, no thread is at work any more.
    """
    batch: list[bytes] = []
    held = total = 0
    working: asyncio.Future[None] | None = None
    try:
        while chunk := await _next(chunks):
            total += len(chunk)
            if total > limit:
                raise PayloadTooLarge(f"The body is larger than the {limit} bytes that fit here.")
            batch.append(chunk)
            held += len(chunk)
            if held >= _BATCH_BYTES:
                if working is not None:
                    await working
                working = asyncio.ensure_future(asyncio.to_thread(consume, batch))
                batch, held = [], 0
        if working is not None:
            await working
            working = None
        if batch:
            working = asyncio.ensure_future(asyncio.to_thread(consume, batch))
            await working
    finally:
        if working is not None and not working.done():
            await asyncio.wait([working])
    return total


def digest_file(path: Path, digest: hashlib._Hash, *, offset: int) -> str:
    """Feed a file from `offset` on into a digest, sync the file, and return the digest in hex."""
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file, full_disk_translated():
        file.seek(offset)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
        os.fsync(file.fileno())
    return digest.hexdigest()


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    """The next chunk that is not empty; empty bytes at the end."""
    try:
        async with asyncio.timeout(_IDLE_SECONDS):
            async for chunk in chunks:
                if chunk:
                    return chunk
    except TimeoutError:
        raise InvalidRequest(
            f"Nothing was received for {_IDLE_SECONDS} seconds.",
            code="body_stalled",
            hint="Send it again; what is recorded of an upload stays.",
        ) from None
    return b""


def _lock_range(file: int, offset: int, length: int) -> None:
    """Lock a range for this open file alone (an OFD lock): other processes and other requests are kept out alike."""
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
    except BlockingIOError:
        raise Conflict(
            "This part is being sent by another request.",
            code="part_in_progress",
            hint="Wait for the other request to end, or send another part.",
        ) from None
