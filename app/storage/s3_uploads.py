"""Uploads that clients send to S3 themselves: the object `<prefix>uploads/<upload id>`, in parts by URLs that we sign.

What lies there is nobody's blob: it becomes one when it has been fetched, hashed and accepted. A URL is for one part of
one upload, of one length and one sha256, which the service holds the bytes against.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from app.storage.s3_client import is_missing, translated
from app.storage.s3_transfer import fetch_all
from app.storage.store import Beat, still

_URL_SECONDS = 900


@dataclass(frozen=True)
class SignedPart:
    """Where to PUT a part, the headers that must be sent with it, and until when (seconds since the epoch)."""

    url: str
    headers: dict[str, str]
    expires_at: float


@dataclass(frozen=True)
class StoredPart:
    """A part as the service has it."""

    bytes: int
    etag: str


class S3Uploads:
    """The uploads in a bucket, below a prefix. `signer` is a client of the service as our clients reach it."""

    def __init__(self, client: Any, signer: Any, *, bucket: str, prefix: str) -> None:
        self._client, self._signer = client, signer
        self._bucket = bucket
        self._prefix = f"{prefix}uploads/"

    def begin(self, upload_id: str) -> str:
        """Begin an upload in parts; returns the service's id of it."""
        with translated(self._bucket):
            # Without the algorithm AWS refuses the checksums of parts; with it, parts without one.
            answer = self._client.create_multipart_upload(
                **self._where(upload_id), ChecksumAlgorithm="SHA256"
            )
        return str(answer["UploadId"])

    def sign(self, upload_id: str, multipart_id: str, number: int, *, length: int, sha256: str) -> SignedPart:
        """A URL for part `number` (from 1) with these bytes and no others, good for a quarter of an hour."""
        checksum, expires_at = _base64(sha256), time.time() + _URL_SECONDS
        part = {"PartNumber": number, "ContentLength": length, "ChecksumSHA256": checksum}
        with translated(self._bucket):
            url = self._signer.generate_presigned_url(
                "upload_part", Params=self._of(upload_id, multipart_id) | part, ExpiresIn=_URL_SECONDS
            )
        return SignedPart(str(url), {"x-amz-checksum-sha256": checksum}, expires_at)

    def parts(self, upload_id: str, multipart_id: str) -> dict[int, StoredPart] | None:
        """The parts that have arrived, by number; None when the upload was completed, or aborted."""
        pages = self._client.get_paginator("list_parts").paginate(**self._of(upload_id, multipart_id))
        with translated(self._bucket):
            try:
                return {
                    part["PartNumber"]: StoredPart(part["Size"], part["ETag"])
                    for page in pages
                    for part in page.get("Parts", ())
                }
            except ClientError as error:
                if is_missing(error):
                    return None
                raise

    def complete(
        self, upload_id: str, multipart_id: str, parts: Mapping[int, tuple[StoredPart, str]]
    ) -> None:
        """Make one object of the parts, given with the sha256 of each. One that was completed or aborted is left alone."""
        listed = [
            {"PartNumber": number, "ETag": part.etag, "ChecksumSHA256": _base64(sha256)}
            for number, (part, sha256) in sorted(parts.items())
        ]
        with translated(self._bucket):
            try:
                self._client.complete_multipart_upload(
                    **self._of(upload_id, multipart_id), MultipartUpload={"Parts": listed}
                )
            except ClientError as error:
                if not is_missing(error):
                    raise

    def size(self, upload_id: str) -> int | None:
        """Bytes of a completed upload; None: there is none."""
        with translated(self._bucket):
            try:
                return int(self._client.head_object(**self._where(upload_id))["ContentLength"])
            except ClientError as error:
                if is_missing(error):
                    return None
                raise

    def fetch(self, upload_id: str, size: int, *, beat: Beat = still) -> Iterator[bytes]:
        """The bytes of a completed upload of `size` bytes, in order. Raises NotFound and Unavailable."""
        with translated(self._bucket):
            yield from fetch_all(self._client, self._where(upload_id), size, beat)

    def remove(self, upload_id: str, multipart_id: str) -> None:
        """Remove an upload, completed or not. Harmless when there is none."""
        self.abort(upload_id, multipart_id)
        self.delete(upload_id)

    def abort(self, upload_id: str, multipart_id: str) -> None:
        """Remove the parts of an upload that was not completed."""
        with translated(self._bucket):
            try:
                self._client.abort_multipart_upload(**self._of(upload_id, multipart_id))
            except ClientError as error:
                if not is_missing(error):
                    raise

    def begun(self, *, older_than_seconds: float) -> Iterator[tuple[str, str]]:
        """Uploads in parts that were begun so long ago and have not ended: (upload id, the service's id)."""
        for upload in self._listed("list_multipart_uploads", "Uploads"):
            if upload["Initiated"].timestamp() < time.time() - older_than_seconds:
                yield upload["Key"].removeprefix(self._prefix), upload["UploadId"]

    def completed(self, *, older_than_seconds: float) -> Iterator[str]:
        """Ids of uploads that were completed so long ago."""
        for entry in self._listed("list_objects_v2", "Contents"):
            if entry["LastModified"].timestamp() < time.time() - older_than_seconds:
                yield entry["Key"].removeprefix(self._prefix)

    def delete(self, upload_id: str) -> None:
        """Remove a completed upload."""
        with translated(self._bucket):
            self._client.delete_object(**self._where(upload_id))

    def _listed(self, call: str, what: str) -> Iterator[dict[str, Any]]:
        with translated(self._bucket):
            for page in self._client.get_paginator(call).paginate(Bucket=self._bucket, Prefix=self._prefix):
                yield from page.get(what, ())

    def _where(self, upload_id: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + upload_id}

    def _of(self, upload_id: str, multipart_id: str) -> dict[str, str]:
        return self._where(upload_id) | {"UploadId": multipart_id}


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode()
