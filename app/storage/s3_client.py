"""A client of an S3-compatible service, and what its errors mean to us.

Credentials come from where every AWS tool finds them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from app.errors import ModelpressError, NotFound, StorageFull, Unavailable

_MISSING = ("404", "NoSuchKey", "NotFound")
_ENDED = "NoSuchUpload"
_REFUSED = (
    "Give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of who may read, write, list and delete in this bucket."
)
_CONFIG = {
    "signature_version": "s3v4",
    # Every request's signature covers the sha256 of its body, which every service checks, with TLS and without; the
    # checksums that AWS has besides are not everywhere.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "max_pool_connections": 32,
}
_PATIENT = {
    "retries": {"mode": "standard", "total_max_attempts": 5},
    "connect_timeout": 5,
    "read_timeout": 30,
}
# Whoever asks for our health waits for a few seconds only.
_IMPATIENT = {"retries": {"total_max_attempts": 1}, "connect_timeout": 2, "read_timeout": 2}


def make_client(endpoint_url: str, region: str, *, patient: bool = True) -> Any:
    """A client of the service at the URL, or of AWS where it is empty. Threads may share it, processes may not."""
    session = botocore.session.get_session()
    # Names of buckets are names of hosts at AWS alone.
    addressing = {"addressing_style": "path" if endpoint_url else "auto", "payload_signing_enabled": True}
    with translated(""):
        return session.create_client(
            "s3",
            endpoint_url=endpoint_url or None,
            region_name=region or session.get_config_variable("region") or "us-east-1",
            config=Config(s3=addressing, **_CONFIG, **(_PATIENT if patient else _IMPATIENT)),
        )


def is_missing(error: ClientError) -> bool:
    """Whether the service says that there is no such object, or upload in parts."""
    return _code(error) in (*_MISSING, _ENDED)


@contextmanager
def translated(bucket: str) -> Iterator[None]:
    """Turn what the service or the way to it says into NotFound, StorageFull or Unavailable, saying what to do."""
    try:
        yield
    except ClientError as error:
        raise _meaning(error, bucket) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise _unavailable(f"There are no credentials for S3: {error}.", _REFUSED) from error
    except BotoCoreError as error:
        raise _unavailable(
            f"The S3 service does not answer as it should: {error}",
            "If it stays away, correct MODELPRESS_S3_ENDPOINT_URL.",
        ) from error


def _meaning(error: ClientError, bucket: str) -> ModelpressError:
    code = _code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return _unavailable(
            f"There is no bucket {bucket} at the S3 service.", "Make it, or correct MODELPRESS_STORE."
        )
    if code in _MISSING:
        return NotFound("The blob is not in the store.", code="blob_missing")
    if status == 507 or code in ("QuotaExceeded", "XMinioStorageFull"):
        return StorageFull(f"The S3 service has no room left ({code}).", hint="Give it more.")
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
        return _unavailable(f"The S3 service refuses us at bucket {bucket} ({code}).", _REFUSED)
    return _unavailable(f"The S3 service failed ({code}).", "See its logs if it goes on.")


def _unavailable(detail: str, hint: str) -> Unavailable:
    return Unavailable(detail, code="storage_unavailable", hint=hint)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))
