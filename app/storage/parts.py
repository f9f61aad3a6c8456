"""The file an upload is written into, part by part, in any order and from any number of processes.

A part's range is locked while it is written, and the caller writes no range twice, so bytes that were once
recorded never change; that is what lets a digest be trusted that was taken while they came in.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import mmap
import os
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

from app.errors import Conflict, InvalidRequest, NotFound, PayloadTooLarge
from app.storage.disk import full_disk_translated, require_free

# Large enough that the hop to a thread costs nothing, small enough that a hundred uploads fit in memory.
_BATCH_BYTES = 2 * 2**20
# What disks and file systems ask of direct writes is 512 or 4096 bytes.
_ALIGNMENT = 4096
# A client that sends no batch for so long (17 kB/s) is gone, though its connection may not know it.
_IDLE_SECONDS = 120
_READ_BYTES = 2**20


def create_file(path: Path, size: int, min_free_bytes: int) -> None:
    """Make the sparse file of an upload."""
    require_free(path.parent, size, min_free_bytes)
    with full_disk_translated(), path.open("xb") as file:
        file.truncate(size)


Consumer = Callable[[memoryview], None]


class RunningDigests:
    """The sha256 of the first parts of each upload, advanced while each next part arrives in order.

    A hint of this process: what did not go in here is read again when the upload completes.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._by_upload: dict[str, tuple[hashlib._Hash, int]] = {}
        self._capacity = capacity
        self._lock = threading.Lock()

    def fork(self, upload_id: str, number: int) -> hashlib._Hash | None:
        """A copy to feed part `number` (from 1) into; None when an earlier part has not gone in."""
        with self._lock:
            digest, parts = self._by_upload.get(upload_id, (hashlib.sha256(), 0))
            return digest.copy() if parts == number - 1 else None

    def advance(self, upload_id: str, number: int, digest: hashlib._Hash) -> None:
        """Keep a fork into which part `number` went whole. Only for the request that recorded the part."""
        with self._lock:
            _, parts = self._by_upload.get(upload_id, (None, 0))
            if parts == number - 1:
                self._by_upload[upload_id] = (digest, number)
            while len(self._by_upload) > self._capacity:
                del self._by_upload[next(iter(self._by_upload))]

    def take(self, upload_id: str) -> tuple[hashlib._Hash, int]:
        """Remove and return the digest and the number of parts that went in."""
        with self._lock:
            return self._by_upload.pop(upload_id, (hashlib.sha256(), 0))


class PartFile:
    """The place of one part, locked until closed. Not for several threads at once.

    A new part is written there with `write`; one that is recorded already is held against what is there with `compare`.
    Writes go past the page cache where the file system allows it: a gigabyte through the cache costs more processor
    time than its sha256 (2 s against 0.6 s on a virtual machine whose host backs pages late), and is not yet on the disk.
    """

    def __init__(self, path: Path, *, offset: int, length: int, min_free_bytes: int) -> None:
        try:
            self._file = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            raise NotFound("The upload is gone: it was used, deleted, or has expired.") from None
        try:
            _lock_range(self._file, offset, length)
        except BaseException:
            os.close(self._file)
            raise
        self._direct = _open_direct(path) if offset % _ALIGNMENT == 0 else None
        self._directory = path.parent
        self._min_free = min_free_bytes
        self._offset = offset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock and close."""
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._file)

    def write(self, batch: memoryview) -> None:
        """Write a batch behind those before. Raises StorageFull."""
        require_free(self._directory, len(batch), self._min_free)
        with full_disk_translated():
            if self._direct is not None and self._offset % _ALIGNMENT == 0:
                batch = self._write(self._direct, batch, len(batch) // _ALIGNMENT * _ALIGNMENT)
            self._write(self._file, batch, len(batch))

    def compare(self, batch: memoryview) -> None:
        """Raise Conflict (`part_differs`) if the bytes behind those before are not these."""
        if os.pread(self._file, len(batch), self._offset) != batch:
            raise Conflict(
                "This part has arrived before, with other bytes.",
                code="part_differs",
                hint="If the file has changed, delete this upload and start a new one.",
            )
        self._offset += len(batch)

    def _write(self, file: int, batch: memoryview, length: int) -> memoryview:
        """Write the first `length` bytes; returns the rest."""
        rest = batch[length:]
        batch = batch[:length]
        while batch:
            written = os.pwrite(file, batch, self._offset)
            self._offset += written
            batch = batch[written:]
        return rest


async def pump(chunks: AsyncIterator[bytes], *consumers: Consumer, limit: int) -> int:
    """Hand the chunks in batches to each consumer, in a thread each, while the next batch arrives. Returns the bytes.

    A consumer is given one batch after the other. Raises PayloadTooLarge past `limit` bytes, InvalidRequest
    (`body_stalled`) when a batch takes minutes, and whatever a consumer raises. When this returns or raises, no thread
    is at work any more.
    """
    batches = _Batches(consumers)
    loop = asyncio.get_running_loop()
    total = 0
    try:
        async with asyncio.timeout(_IDLE_SECONDS) as idle:
            async for chunk in chunks:
                total += len(chunk)
                if total > limit:
                    raise PayloadTooLarge(f"The body is larger than the {limit} bytes that fit here.")
                if await batches.add(chunk):
                    idle.reschedule(loop.time() + _IDLE_SECONDS)
            idle.reschedule(None)
            await batches.flush()
    except TimeoutError:
        raise InvalidRequest(
            f"Less than {_BATCH_BYTES} bytes arrived within {_IDLE_SECONDS} seconds.",
            code="body_stalled",
            hint="Send it again; what is recorded of an upload stays.",
        ) from None
    finally:
        await batches.settle()
    return total


class _Batches:
    """Two buffers in turn: one is filled while the other is consumed in a thread.

    Chunks are copied rather than kept: freed at once, their memory is used again for the next chunk. Kept until the
    batch is full, every chunk came in fresh pages, and the kernel spent more time on zeroing those than all else took.
    """

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        self._consumers = consumers
        # Maps are aligned to pages, as direct writes must be.
        self._filling = memoryview(mmap.mmap(-1, _BATCH_BYTES))
        self._spare = memoryview(mmap.mmap(-1, _BATCH_BYTES))
        self._held = 0
        self._working: list[asyncio.Future[None]] = []

    async def add(self, chunk: bytes) -> bool:
        """Take a chunk. True: a batch was handed over."""
        rest = memoryview(chunk)
        handed = False
        while rest:
            taken = min(len(rest), _BATCH_BYTES - self._held)
            self._filling[self._held : self._held + taken] = rest[:taken]
            self._held += taken
            rest = rest[taken:]
            if self._held == _BATCH_BYTES:
                await self._hand_over()
                handed = True
        return handed

    async def flush(self) -> None:
        """Hand over what is left and wait until all is consumed."""
        if self._held:
            await self._hand_over()
        await self._consumed()

    async def settle(self) -> None:
        """Wait until no thread is at work, even if cancelled meanwhile: the file they write to is closed after this."""
        cancelled: asyncio.CancelledError | None = None
        while any(not work.done() for work in self._working):
            try:
                await asyncio.wait(self._working)
            except asyncio.CancelledError as error:
                cancelled = error
        for work in self._working:
            # Looked at, or asyncio complains: the first failure has been raised already.
            work.exception()
        if cancelled is not None:
            raise cancelled

    async def _hand_over(self) -> None:
        await self._consumed()
        batch = self._filling[: self._held]
        self._working = [asyncio.ensure_future(asyncio.to_thread(c, batch)) for c in self._consumers]
        self._filling, self._spare, self._held = self._spare, self._filling, 0

    async def _consumed(self) -> None:
        if self._working:
            # Awaiting the work itself would cancel it with us, and its thread would go on unseen.
            await asyncio.wait(self._working)
        for work in self._working:
            work.result()


def digest_file(path: Path, digest: hashlib._Hash, *, offset: int) -> str:
    """Feed a file from `offset` on into a digest, sync the file, and return the digest in hex."""
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file, full_disk_translated():
        file.seek(offset)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
        os.fsync(file.fileno())
    return digest.hexdigest()


def _open_direct(path: Path) -> int | None:
    """The file for writes past the page cache; None where the system or the file system has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


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
