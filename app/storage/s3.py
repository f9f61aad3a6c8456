"""Blobs as objects of an S3-compatible service: `<prefix>blobs/ab/<sha256>`, the layout of the local store.

An object appears whole or not at all, which is the service's promise, for one request and for an upload in parts alike.
What was put is hashed while it is sent, what comes back is hashed while it is written.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from botocore.exceptions import ClientError

from app.errors import NotFound, Unavailable
from app.settings import Settings
from app.storage.disk import full_disk_translated, require_free
from app.storage.s3_client import is_missing, make_client, translated
from app.storage.s3_transfer import PIECE_BYTES, ObjectReader, fetch_all, put_large, put_small
from app.storage.s3_uploads import S3Uploads
from app.storage.staging import StagedWriter
from app.storage.store import Beat, BlobInfo, blob_name, is_digest, still

_URL_SECONDS = 300
_OPERATION = {"GET": "get_object", "HEAD": "head_object"}


class S3Store:
    """An ArtifactStore in a bucket, below the prefix that `MODELPRESS_STORE` names. Threads may share it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bucket, _, prefix = settings.store.removeprefix("s3://").partition("/")
        self._prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        self._client = make_client(settings.s3_endpoint_url, settings.s3_region)
        public_url = settings.s3_public_endpoint_url
        self._signer = make_client(public_url, settings.s3_region) if public_url else self._client
        self._presigned = settings.s3_downloads == "presigned"
        self._spool = settings.data_dir.absolute() / "staging" / "incoming"
        self._min_free = settings.min_free_disk_bytes
        self.direct_uploads = S3Uploads(self._client, self._signer, bucket=self._bucket, prefix=self._prefix)

    def check(self) -> None:
        """List, and write a small object: the two tell a missing bucket, wrong credentials and missing rights apart."""
        with self._errors():
            self._prober.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            self._prober.put_object(Bucket=self._bucket, Key=f"{self._prefix}writable", Body=b"modelpress")

    def put_file(self, path: Path, sha256: str, *, beat: Beat = still) -> None:
        """Keep a file whose sha256 the caller has computed; what is sent is held against it before it appears.

        A blob that is there already is sent again: the time tells no tenant what others keep. Raises Unavailable
        (`file_changed`) when the file is another by now, StorageFull and Unavailable.
        """
        size = path.stat().st_size
        with self._errors():
            if size <= PIECE_BYTES:
                put_small(self._client, self._where(sha256), path, sha256)
                return
            try:
                put_large(self._client, self._where(sha256), path, sha256, beat)
            except ClientError:
                # The upload is unknown when it was completed, but the answer got lost.
                if self._size(sha256) != size:
                    raise

    def put_stream(self, chunks: Iterable[bytes]) -> BlobInfo:
        """Keep what the chunks add up to: their digest is their name, so they are written to the disk before."""
        self._spool.mkdir(parents=True, exist_ok=True)
        writer = StagedWriter(self._spool / secrets.token_hex(8), self._min_free)
        try:
            for chunk in chunks:
                writer.write(chunk)
            staged = writer.close()
            self.put_file(staged.path, staged.sha256)
        finally:
            writer.abandon()
        return BlobInfo(staged.sha256, staged.bytes, time.time())

    def open(self, sha256: str) -> BinaryIO:
        """Open a blob for reading; a few megabytes are fetched at a time."""
        reader = ObjectReader(self._client, self._where(sha256), self._require(sha256))
        return cast("BinaryIO", io.BufferedReader(reader, PIECE_BYTES))

    def path_of(self, sha256: str) -> Path | None:  # noqa: ARG002 - no blob has one
        """None: no blob is a file here."""
        return None

    def url_of(
        self, sha256: str, *, method: Literal["GET", "HEAD"], media_type: str, disposition: str
    ) -> str | None:
        """A presigned URL of a few minutes; a download that has begun by then goes on."""
        if not self._presigned:
            return None
        shown_as = {
            "ResponseContentType": media_type,
            "ResponseContentDisposition": disposition,
            "ResponseCacheControl": "private, max-age=31536000, immutable",
        }
        with self._errors():
            url = self._signer.generate_presigned_url(
                _OPERATION[method], Params=self._where(sha256) | shown_as, ExpiresIn=_URL_SECONDS
            )
        return str(url)

    def materialize(self, sha256: str, target: Path, *, beat: Beat = still) -> None:
        """Fetch a blob as the read-only file `target`, which appears once its sha256 is known to be right.

        Raises Unavailable (`blob_damaged`) when it is not, StorageFull and Unavailable.
        """
        size = self._require(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        require_free(target.parent, size, self._min_free)
        arriving = target.with_name(f".{secrets.token_hex(8)}")
        digest = hashlib.sha256()
        try:
            with self._errors(), full_disk_translated(), arriving.open("xb") as file:
                for piece in fetch_all(self._client, self._where(sha256), size, beat):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != sha256:
                raise Unavailable(
                    f"The blob {sha256} came from the S3 service with sha256 {digest.hexdigest()}.",
                    code="blob_damaged",
                    hint="Upload the model or dataset again, and have the S3 service checked.",
                )
            arriving.chmod(0o444)
            arriving.rename(target)
        finally:
            arriving.unlink(missing_ok=True)

    def exists(self, sha256: str) -> bool:
        """Whether there is such a blob."""
        return self._size(sha256) is not None

    def delete(self, sha256: str) -> bool:
        """Remove a blob. False: there was none."""
        if not self.exists(sha256):
            return False
        with self._errors():
            self._client.delete_object(**self._where(sha256))
        return True

    def iter_blobs(self) -> Iterator[BlobInfo]:
        """Every blob; `put_at` is when it was last put."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._errors():
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}blobs/"):
                for entry in page.get("Contents", ()):
                    name = entry["Key"].rsplit("/", 1)[-1]
                    if is_digest(name):
                        yield BlobInfo(name, entry["Size"], entry["LastModified"].timestamp())

    def remove_unfinished(self, *, older_than_seconds: float) -> int:
        """Abort uploads in parts that nobody completes any more: their parts are kept, and paid for, until then."""
        before = time.time() - older_than_seconds
        pages = self._client.get_paginator("list_multipart_uploads")
        removed = 0
        with self._errors():
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}blobs/"):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() < before:
                        names = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                        self._client.abort_multipart_upload(Bucket=self._bucket, **names)
                        removed += 1
        return removed

    @cached_property
    def _prober(self) -> Any:
        return make_client(self._settings.s3_endpoint_url, self._settings.s3_region, patient=False)

    def _size(self, sha256: str) -> int | None:
        """Bytes of a blob; None: there is none."""
        with self._errors():
            try:
                return int(self._client.head_object(**self._where(sha256))["ContentLength"])
            except ClientError as error:
                if is_missing(error):
                    return None
                raise

    def _require(self, sha256: str) -> int:
        size = self._size(sha256)
        if size is None:
            raise NotFound(f"The blob {sha256} is not in the store.", code="blob_missing")
        return size

    def _where(self, sha256: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + blob_name(sha256)}

    def _errors(self) -> AbstractContextManager[None]:
        return translated(self._bucket)
