"""Uploads straight to S3: where their parts go."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import ConfigDict, Field, field_validator

from app.api.dependencies import TenantDatabase
from app.api.problems import problem_responses
from app.api.request_body import RequestBody
from app.api.uploads import Sha256, UploadId
from app.services import direct_uploads
from app.spec.documented import Documented

# Not an IdempotentRoute: kept answers would hold signatures.
router = APIRouter(prefix="/uploads", tags=["uploads"])


class AnnouncedPart(Documented):
    """A part you are about to send."""

    model_config = ConfigDict(extra="forbid")

    number: Annotated[int, Field(ge=1, le=10**9)]
    """From 1."""
    sha256: Sha256
    """sha256 of the part's bytes in hex. S3 takes no others."""


class CreatePartUrls(RequestBody):
    """Which parts are to be sent."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"parts": [{"number": 1, "sha256": "2c" * 32}]}]},
    )

    parts: Annotated[list[AnnouncedPart], Field(min_length=1, max_length=100)]

    @field_validator("parts")
    @classmethod
    def _each_once(cls, parts: list[AnnouncedPart]) -> list[AnnouncedPart]:
        if len({part.number for part in parts}) < len(parts):
            raise ValueError("a part is named twice")
        return parts


class PartUrl(Documented):
    """Where a part goes."""

    number: int = Field(examples=[1])
    """From 1."""
    url: str = Field(examples=["https://bucket.s3.amazonaws.com/uploads/upl_01k0b6x2v9m4c8d7e5f3g1h0j2?…"])
    """PUT the raw bytes of the part here, with the headers below and no credentials. Ask again for a fresh one."""
    headers: dict[str, str] = Field(examples=[{"x-amz-checksum-sha256": "LCws…"}])
    """Without them, or with another length or other bytes, S3 refuses the part."""
    expires_at: datetime
    """A part that has begun by then may end later."""


class PartUrls(Documented):
    """Where parts go, in the order they were asked for."""

    items: list[PartUrl]


@router.post(
    "/{upload_id}/part-urls",
    operation_id="create_part_urls",
    summary="Ask where in S3 parts go",
    responses=problem_responses(404, 409),
)
def create_part_urls(
    upload_id: UploadId, body: CreatePartUrls, database: TenantDatabase, response: Response
) -> PartUrls:
    """Announce parts of a direct upload and get a URL for each, for one `PUT` of its bytes within minutes.

    Ask for a few parts at a time, and again for those whose URL has expired. A part keeps the sha256 it was first
    announced with.
    """
    wanted = {part.number: part.sha256 for part in body.parts}
    signed = direct_uploads.sign_parts(database, upload_id, wanted)
    response.headers["Cache-Control"] = "no-store"
    return PartUrls(
        items=[
            PartUrl(
                number=number,
                url=part.url,
                headers=part.headers,
                expires_at=datetime.fromtimestamp(part.expires_at, UTC),
            )
            for number, part in signed.items()
        ]
    )
