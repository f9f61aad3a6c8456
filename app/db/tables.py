"""The tables. Times are seconds since the epoch by the database's clock; JSON columns hold what pydantic dumped."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.db.engine import db_now
from app.db.tenancy import TenantRow, tenant_of_statement


class Base(DeclarativeBase):
    """Names of constraints are fixed, so that migrations can name them on both databases."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger,
        float: Double,
        dict[str, Any]: JSON,
        list[Any]: JSON,
    }


def _of_a_tenant() -> ForeignKeyConstraint:
    """Of tables whose rows belong to a tenant by themselves; those below them belong to it through their parents."""
    return ForeignKeyConstraint(["tenant_id"], ["tenants.id"])


class Tenant(Base):
    """Whoever shares nothing with the others but the machines."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(primary_key=True)
    """A short name, e.g. `acme`."""
    max_stored_bytes: Mapped[int | None]
    """Null, of each `max_`: no limit."""
    max_queued_jobs: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    max_worker_seconds: Mapped[int | None]
    """A month."""
    artifact_retention_days: Mapped[int | None]
    """Null, here and below: as the service's settings say; 0: for ever."""
    audit_retention_days: Mapped[int | None]
    turn: Mapped[int] = mapped_column(default=0)
    """Grows with every job that is started, over all tenants: whoever has the lowest was served longest ago."""
    created_at: Mapped[float] = mapped_column(default=db_now())


class Upload(TenantRow, Base):
    """A file on its way in, part by part; its bytes lie in staging until it is completed."""

    __tablename__ = "uploads"
    __table_args__ = (_of_a_tenant(), Index("ix_uploads_tenant_id_id", "tenant_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    size: Mapped[int]
    """Of an import under way, the bytes that are kept for it in the tenant's quota."""
    sha256: Mapped[str | None]
    part_bytes: Mapped[int]
    """0: the service fetches it itself, see Import."""
    direct: Mapped[bool] = mapped_column(default=False)
    """Its parts go to S3 themselves; of each, UploadPart says which are announced."""
    multipart_id: Mapped[str | None]
    """S3's name of the upload in parts, once it was begun there; only of a direct one."""
    status: Mapped[str] = mapped_column(default="open")
    """open → completed, or importing → completed | failed."""
    created_at: Mapped[float] = mapped_column(default=db_now())
    expires_at: Mapped[float]


class UploadPart(TenantRow, Base):
    """A part that has arrived whole; of a direct upload, one whose sha256 was announced."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    bytes: Mapped[int]
    sha256: Mapped[str | None]
    """Of its bytes, where the client sent it and so had it checked."""


class Import(TenantRow, Base):
    """How far the service is with an upload that it fetches from a URL."""

    __tablename__ = "imports"
    __table_args__ = (Index("ix_imports_due_at", "due_at"),)

    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    url: Mapped[str]
    """Its query, which may open a door, is cut off once the import has ended."""
    total: Mapped[int | None]
    """Bytes the server announced; null: it has not, or not yet."""
    etag: Mapped[str | None]
    """Where it is strong: then what is there can be gone on with."""
    bytes: Mapped[int] = mapped_column(default=0)
    """How many are on the disk for good."""
    attempt: Mapped[int] = mapped_column(default=0)
    """The last one since there was progress, from 1."""
    fence: Mapped[int] = mapped_column(default=0)
    """Grows with every claim; whoever holds an older one changes nothing."""
    running: Mapped[bool] = mapped_column(default=False)
    due_at: Mapped[float | None] = mapped_column(default=db_now())
    """When it may be claimed: of one that runs, the end of its lease; null: it has ended."""
    started_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    """Of the last attempt: `{"code", "detail", "hint"}`."""


class Model(TenantRow, Base):
    """A model that may be compressed: its files are in the store, its facts read from their headers."""

    __tablename__ = "models"
    __table_args__ = (_of_a_tenant(), Index("ix_models_tenant_id_id", "tenant_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    format: Mapped[str]
    architecture: Mapped[str]
    family: Mapped[str]
    parameters: Mapped[int]
    dtype: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str]
    """Of the sorted list of files and their digests: the same for the same files, however they came."""
    facts: Mapped[dict[str, Any]]
    scan: Mapped[list[Any]] = mapped_column(default=list)
    """Files that were left out at intake: `{"path", "reason"}` each."""
    source: Mapped[str]
    """Where it came from: `upload`, or the import URI."""
    created_at: Mapped[float] = mapped_column(default=db_now())


class ModelFile(TenantRow, Base):
    """One file of a model."""

    __tablename__ = "model_files"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]


class Dataset(TenantRow, Base):
    """Text or images to calibrate, train or evaluate on: one file in the store."""

    __tablename__ = "datasets"
    __table_args__ = (_of_a_tenant(), Index("ix_datasets_tenant_id_id", "tenant_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    format: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(index=True)
    images: Mapped[dict[str, Any] | None]
    """Facts of a set of images; null for text."""
    texts: Mapped[dict[str, Any] | None]
    """Facts of a set of texts with labels; null for images, and for text without."""
    created_at: Mapped[float] = mapped_column(default=db_now())


class Job(TenantRow, Base):
    """A compression job. Its row is the queue's truth and outbox; a message on the broker is a hint."""

    __tablename__ = "jobs"
    __table_args__ = (
        _of_a_tenant(),
        Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
        Index("ix_jobs_tenant_id_status_id", "tenant_id", "status", "id"),
        Index("ix_jobs_tenant_id_model_id_id", "tenant_id", "model_id", "id"),
        Index("ix_jobs_turn", "tenant_id", "queue", "status", "priority", "queued_at"),
        Index("ix_jobs_status_lease_until", "status", "lease_until"),
        Index("ix_jobs_status_dispatched_at", "status", "dispatched_at"),
        Index("ix_jobs_tenant_id_result_key", "tenant_id", "result_key"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    """No foreign key: a job that has ended outlives its model."""
    model_name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    technique: Mapped[str]
    """Techniques of the steps joined by `+`: the label of metrics."""
    recipe: Mapped[str | None]
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)
    queue: Mapped[str]
    priority: Mapped[int] = mapped_column(default=1)
    """0 high, 1 normal, 2 low: the order among one tenant's jobs."""

    status: Mapped[str] = mapped_column(default="queued")
    """queued → running → succeeded | failed | cancelled."""
    verdict: Mapped[str | None]
    result_key: Mapped[str | None]
    """Digest of what decides the result (`app.services.result_cache`); null: it is for this job alone."""
    engine_version: Mapped[str | None]
    """Of all workers that had a part in the result; null before the first, and of several versions."""
    result_of: Mapped[str | None]
    """The earlier job whose result this is, where nothing was run for it. No foreign key: this one outlives it."""
    memory_bytes: Mapped[int | None]
    """The least it was predicted to need: workers with less leave it to others. Null: it was not predicted."""
    traceparent: Mapped[str | None]
    """The span of the request that submitted it (W3C Trace Context), of which its attempts are children; null: no traces."""
    stage: Mapped[int] = mapped_column(default=0)
    """How many stages are committed."""
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int]
    fence: Mapped[int] = mapped_column(default=0)
    """Grows with every claim; whoever holds an older one changes no row."""
    lease_owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    keep_best_requested: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Training is to stop, and the job to go on with the best state so far."""
    dispatched_at: Mapped[float | None]
    run_after: Mapped[float | None]

    progress: Mapped[float] = mapped_column(default=0.0)
    eta_seconds: Mapped[float | None]
    event_count: Mapped[int] = mapped_column(default=0)
    error: Mapped[dict[str, Any] | None]
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    created_at: Mapped[float] = mapped_column(default=db_now())
    queued_at: Mapped[float] = mapped_column(default=db_now())
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]


class JobLabel(TenantRow, Base):
    """A label of a job, to find it by; the job's row has all of them."""

    __tablename__ = "job_labels"

    tenant_id: Mapped[str] = mapped_column(primary_key=True, default=tenant_of_statement)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, index=True
    )


class JobStage(TenantRow, Base):
    """One stage of a job."""

    __tablename__ = "job_stages"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    status: Mapped[str] = mapped_column(default="pending")
    """pending → running → done."""
    progress: Mapped[float] = mapped_column(default=0.0)
    directory: Mapped[str | None]
    """Where its files lie below the job's scratch directory, once committed."""
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]


class WorkerTime(TenantRow, Base):
    """How long a worker held a job under one claim. No foreign key to the job: what was used stays used without it."""

    __tablename__ = "worker_time"
    __table_args__ = (
        _of_a_tenant(),
        Index("ix_worker_time_sum", "tenant_id", "held_until", "started_at"),
    )

    job_id: Mapped[str] = mapped_column(primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True)
    started_at: Mapped[float]
    held_until: Mapped[float]
    """The last that is known of it; grows with heartbeats while the job runs."""


class JobEvent(TenantRow, Base):
    """Something that happened to a job. Numbers are dense per job: 1, 2, 3 …"""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=db_now())


class Artifact(TenantRow, Base):
    """A file a job left: part of the result, or a report."""

    __tablename__ = "artifacts"
    __table_args__ = (Index("ix_artifacts_expiry", "tenant_id", "kind", "expired_at", "created_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    kind: Mapped[str]
    """`model`, `report` (JSON) or `report_html`."""
    path: Mapped[str]
    media_type: Mapped[str]
    sha256: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]
    created_at: Mapped[float] = mapped_column(default=db_now())
    expired_at: Mapped[float | None]
    """When its bytes were given up; a day later nothing keeps them."""


class IdempotencyKey(TenantRow, Base):
    """A mutating call that carried an Idempotency-Key, and what it was answered."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(primary_key=True, default=tenant_of_statement)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    status_code: Mapped[int | None]
    """Null while the first call is in flight."""
    headers: Mapped[dict[str, Any] | None]
    body: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(default=db_now())


class ApiKey(TenantRow, Base):
    """A key that was handed out. The key itself is not here: who reads this table can call nothing."""

    __tablename__ = "api_keys"
    __table_args__ = (_of_a_tenant(), Index("ix_api_keys_tenant_id_id", "tenant_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    """For people: whom or what it was made for."""
    role: Mapped[str]
    digest: Mapped[str]
    """HMAC-SHA256 of the whole key under the service's secret, in hex."""
    created_at: Mapped[float] = mapped_column(default=db_now())
    created_by: Mapped[str]
    """The key or the command line that made it."""
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
    """To the minute."""


class AuditEntry(TenantRow, Base):
    """A transaction in which somebody changed something; written in it. Never changed afterwards."""

    __tablename__ = "audit_entries"
    __table_args__ = (_of_a_tenant(), Index("ix_audit_entries_tenant_id_id", "tenant_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    principal: Mapped[str]
    call: Mapped[str]
    """Method and path, or the command."""
    address: Mapped[str | None]
    request_id: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(default=db_now())


class WebhookEndpoint(TenantRow, Base):
    """Where a tenant wants to hear of its jobs. Its secret is not here: it is derived from the service's."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (_of_a_tenant(), Index("ix_webhook_endpoints_tenant_id_id", "tenant_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    url: Mapped[str]
    events: Mapped[list[Any]]
    description: Mapped[str]
    secret_version: Mapped[int] = mapped_column(default=1)
    previous_secret_until: Mapped[float | None]
    disabled_reason: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(default=db_now())


class WebhookMessage(TenantRow, Base):
    """Something an endpoint is to be told: written in the transaction in which it happened, sent afterwards."""

    __tablename__ = "webhook_messages"
    __table_args__ = (
        Index("ix_webhook_messages_status_next_attempt_at", "status", "next_attempt_at"),
        Index("ix_webhook_messages_endpoint_id_id", "endpoint_id", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(default="pending")
    """`pending`, `delivered` or `dead`."""
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[float] = mapped_column(default=db_now())
    answer_status: Mapped[int | None]
    error: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(default=db_now())
    ended_at: Mapped[float | None]


class Worker(Base):
    """A worker that has announced itself; gone when it has not been seen for a while."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    queues: Mapped[str]
    hardware: Mapped[dict[str, Any]]
    sandbox: Mapped[str]
    started_at: Mapped[float] = mapped_column(default=db_now())
    seen_at: Mapped[float] = mapped_column(default=db_now())
