"""What is known of an upload: its parts, what is missing, and what to say when something is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.db.tables import Import, Upload, UploadPart
from app.errors import Conflict, InvalidRequest, NotFound


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


def require_part(upload: Upload, number: int) -> None:
    """Raise InvalidRequest (`no_such_part`) unless the upload has a part of this number."""
    if not 1 <= number <= part_count(upload):
        raise InvalidRequest(
            f"Upload {upload.id} has parts 1 to {part_count(upload)}; there is no part {number}.",
            code="no_such_part",
        )


def require_open(upload: Upload) -> None:
    """Raise Conflict unless parts may come in."""
    if upload.status != "open":
        raise Conflict(f"Upload {upload.id} is {upload.status}.", code="upload_completed")


def found(upload: Upload | None, upload_id: str) -> Upload:
    """The upload. Raises NotFound where there is none."""
    if upload is None:
        raise not_found(upload_id)
    return upload


def not_found(upload_id: str) -> NotFound:
    """For an upload that is not there."""
    return NotFound(
        f"There is no upload {upload_id}: it was never made, was used or deleted, or has expired.",
        hint="Start a new one with POST /v1/uploads.",
    )


def incomplete(state: UploadState) -> Conflict:
    """For an upload that misses parts."""
    missing = state.missing
    shown = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
    return Conflict(
        f"{len(missing)} of {state.part_count} parts are missing: {shown}.",
        code="upload_incomplete",
        hint="Send them and complete the upload again.",
    )
