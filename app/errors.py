"""Every error a user can meet, raised where it is known and rendered once at the edge.

ModelpressError
├── InvalidRequest            422  the request, or a spec, asks for what cannot be
│   └── UnsupportedForModel   422  a valid spec that does not fit this model
├── IntakeError               422  an uploaded file was refused; nothing of it was kept
├── Unauthenticated           401  no key, or one that is not valid any more
├── Forbidden                 403  the key is good and does not allow this
│   └── QuotaExceeded         403  the tenant uses as much as it may
├── TooManyRequests           429  not now; the same call may succeed later
├── NotFound                  404
├── Conflict                  409  the resource is not in a state that allows this
├── Gone                      410  it was there and has been given up
├── PayloadTooLarge           413
├── RangeNotSatisfiable       416
├── StorageFull               507
├── Unavailable               503  a dependency is down; the same call may succeed later
└── JobFailed                 409  raised inside a job's process, stored on the job, shown by its result
    ├── OutOfMemory                the job needed more memory than it was given
    └── VerificationFailed         the written files do not do what the original does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a request body: where (RFC 6901 JSON pointer) and what to do about it."""

    pointer: str
    detail: str


class ModelpressError(Exception):
    """An error with an HTTP status, a stable machine-readable code and a hint that says what to do."""

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(
        self, detail: str, *, code: str | None = None, hint: str | None = None, faults: Sequence[Fault] = ()
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.default_code
        self.hint = hint
        self.faults = tuple(faults)


class InvalidRequest(ModelpressError):
    """The request is understood and cannot be carried out as it stands."""

    status = 422
    default_code = "invalid_request"
    title = "Invalid request"


class UnsupportedForModel(InvalidRequest):
    """The spec is valid, but not for this model: refused at submit, not at hour six."""

    default_code = "unsupported_for_model"
    title = "Not supported for this model"


class IntakeError(ModelpressError):
    """An uploaded or imported file was refused. `code` names the reason; nothing of the file was kept."""

    status = 422
    default_code = "file_refused"
    title = "File refused"


class Unauthenticated(ModelpressError):
    """Nobody knows who is asking: no key came with the call, or one that is unknown, expired or revoked."""

    status = 401
    default_code = "unauthenticated"
    title = "Not authenticated"


class Forbidden(ModelpressError):
    """It is known who is asking, and they may not do this."""

    status = 403
    default_code = "forbidden"
    title = "Not allowed"


class QuotaExceeded(Forbidden):
    """The tenant may not use so much. The same call will not soon succeed."""

    default_code = "quota_exceeded"
    title = "Quota exceeded"


class TooManyRequests(ModelpressError):
    """The tenant may not have so much under way at once."""

    status = 429
    default_code = "too_many_requests"
    title = "Too many requests"


class NotFound(ModelpressError):
    """There is no such resource."""

    status = 404
    default_code = "not_found"
    title = "Not found"


class Conflict(ModelpressError):
    """The resource is not in a state that allows this."""

    status = 409
    default_code = "conflict"
    title = "Conflict"


class Gone(ModelpressError):
    """The resource was there and has been given up, as was announced."""

    status = 410
    default_code = "gone"
    title = "Gone"


class PayloadTooLarge(ModelpressError):
    """The body is larger than the route or the quota allows."""

    status = 413
    default_code = "payload_too_large"
    title = "Payload too large"


class RangeNotSatisfiable(ModelpressError):
    """The Range header asks for bytes outside the file."""

    status = 416
    default_code = "range_not_satisfiable"
    title = "Range not satisfiable"


class StorageFull(ModelpressError):
    """The disk or the quota has no room left; what was half-written is removed."""

    status = 507
    default_code = "storage_full"
    title = "Storage full"


class Unavailable(ModelpressError):
    """A dependency does not answer; the same call may succeed later."""

    status = 503
    default_code = "unavailable"
    title = "Service unavailable"


class JobFailed(ModelpressError):
    """A job ended without a result. `retryable` says whether the same job could succeed on another try."""

    status = 409
    default_code = "job_failed"
    title = "Job failed"
    retryable: ClassVar[bool] = False


class OutOfMemory(JobFailed):
    """The job needed more memory than it was given."""

    default_code = "out_of_memory"
    title = "Out of memory"


class VerificationFailed(JobFailed):
    """The exported files, reloaded by themselves, do not do what the original does."""

    default_code = "verification_failed"
    title = "Verification failed"
