"""The environment, read once and frozen. Every variable starts with MODELPRESS_, but for REDIS_URL and DATABASE_URL."""

from __future__ import annotations

import ipaddress
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 2**20
GIB = 2**30

SandboxLevel = Literal["namespaces", "landlock", "process"]
SANDBOX_LEVELS: tuple[SandboxLevel, ...] = ("namespaces", "landlock", "process")
"""Strongest first."""


def _physical_memory() -> int:
    """Bytes of memory this machine, or the container around us, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    if limit_file.exists():
        text = limit_file.read_text().strip()
        if text.isdigit():
            total = min(total, int(text))
    return total


class Settings(BaseSettings):
    """What differs between deployments. Defaults are those of one-command mode on a developer's machine."""

    model_config = SettingsConfigDict(env_prefix="MODELPRESS_", frozen=True, extra="ignore")

    data_dir: Path = Path("modelpress-data")
    """Everything kept on disk: database (SQLite), blobs unless `store` says otherwise, staging, scratch."""
    database_url: str = Field(
        default="", validation_alias=AliasChoices("DATABASE_URL", "MODELPRESS_DATABASE_URL")
    )
    """SQLAlchemy URL. Empty: SQLite inside `data_dir`."""
    store: str = Field(default="", pattern=r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?)?$")
    """Where blobs are kept: s3://bucket/prefix. Empty: inside `data_dir`."""
    s3_endpoint_url: str = ""
    """An S3-compatible service, e.g. https://minio.example.org:9000. Empty: AWS."""
    s3_public_endpoint_url: str = ""
    """The same service as clients reach it, for presigned URLs. Empty: as we do."""
    s3_region: str = ""
    """Empty: that of the AWS configuration, else us-east-1."""
    s3_downloads: Literal["presigned", "streamed"] = "presigned"
    """`streamed`: downloads pass through the API, for clients that cannot reach the S3 service."""
    s3_uploads: Literal["", "direct", "streamed"] = ""
    """Whether clients that ask for it send parts straight to S3. Empty: where downloads are presigned."""
    redis_url: str = Field(default="", validation_alias=AliasChoices("REDIS_URL", "MODELPRESS_REDIS_URL"))
    """Broker. Empty: one-command mode starts its own on a unix socket."""

    host: str = "127.0.0.1"
    port: int = 8000
    public_url: str = ""
    """Base of the URLs in answers, e.g. https://modelpress.example.org. Empty: relative URLs."""

    anonymous: bool = True
    """Whether calls without a key are answered, as an administrator's. Only where nobody but this machine can call."""
    secret_key: SecretStr = SecretStr("")
    """Digests of API keys are made with it: 32 characters or more. Empty: a file inside `data_dir`, on loopback alone."""

    oidc_issuer: str = ""
    """Whose bearer tokens are taken beside API keys, e.g. `https://login.example.org/realms/ml`. Empty: nobody's."""
    oidc_audience: str = ""
    """What tokens must be meant for (`aud`). Needed with an issuer."""
    oidc_tenant_claim: str = "tenant"
    oidc_role_claim: str = "role"
    rate_limit_per_minute: int = Field(default=0, ge=0)
    """Calls a tenant may make; 0: as many as it likes."""

    max_upload_bytes: int = 200 * GIB
    max_raw_body_bytes: int = 512 * MIB
    """For `PUT /models/content` and datasets; larger files go up in parts."""
    max_form_bytes: int = 100 * MIB
    """For `POST /compress`, whose form the server must spool."""
    max_json_bytes: int = 1 * MIB
    part_bytes: int = 64 * MIB
    """Size of an upload's parts, the last one excepted; between 8 and 64 MiB."""
    upload_expiry_seconds: int = 86_400
    """An upload that has not been completed by then is removed."""
    min_free_disk_bytes: int = 1 * GIB
    """Uploads and jobs that would leave less than this on the disk are refused."""

    import_root: Path | None = None
    """`file://` imports are allowed below this directory; none: not at all."""
    hub_endpoint: str = "https://huggingface.co"
    """Where `hf://` imports go."""
    hub_token: str | None = None
    import_concurrency: int = Field(default=4, ge=1)
    """How many `https://` imports one API process fetches at once."""
    import_idle_seconds: float = 60
    """An attempt ends when not another MiB has come within this."""
    import_timeout_seconds: float = 6 * 3600
    """For one import with all its attempts."""

    outbound_networks: Annotated[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...], NoDecode] = ()
    """Networks that are not on the open internet which webhooks and imports may reach all the same."""
    webhook_timeout_seconds: float = 15
    """For one attempt, from resolving the name to the end of the answer."""

    lease_seconds: float = 60
    heartbeat_seconds: float = 10
    sweep_seconds: float = 5
    redispatch_seconds: float = 60
    """A queued job whose message was sent this long ago is sent again: the message may be lost."""
    scratch_retention_seconds: float = 3600
    """How long the finished stages of a failed or cancelled job are kept for a retry."""
    artifact_retention_days: int = Field(default=0, ge=0, le=36_500)
    """How long the files of results are kept, where a tenant's own retention says nothing else; 0: for ever."""
    audit_retention_days: int = Field(default=0, ge=0, le=36_500)
    """The same for entries of the audit log."""
    max_attempts: int = 3
    kill_grace_seconds: float = 1
    """Between SIGTERM and SIGKILL for a job's process group."""

    worker_queues: str = "cpu"
    """Comma separated; a worker with a GPU takes `gpu` as well."""
    worker_memory_bytes: int = Field(default_factory=lambda: int(_physical_memory() * 0.8))
    """What one job may use on this worker."""
    worker_threads: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)))
    worker_concurrency: int = 1
    sandbox: SandboxLevel = "process"
    """The weakest sandbox a worker may run jobs in. The strongest the machine has is used; a weaker one stops the worker."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "console"] = "json"

    @field_validator("secret_key")
    @classmethod
    def _long_enough(cls, key: SecretStr) -> SecretStr:
        if 0 < len(key) < 32:
            raise ValueError("needs 32 characters or more; make one with: openssl rand -hex 32")
        return key

    @field_validator("outbound_networks", mode="before")
    @classmethod
    def _separate(cls, networks: object) -> object:
        return (
            [n.strip() for n in networks.split(",") if n.strip()] if isinstance(networks, str) else networks
        )

    @model_validator(mode="after")
    def _oidc_is_whole(self) -> Settings:
        if not self.oidc_issuer:
            return self
        parts = urlsplit(self.oidc_issuer)
        if not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))):
            raise ValueError("MODELPRESS_OIDC_ISSUER must be an https:// URL")
        if not self.oidc_audience:
            raise ValueError(
                "MODELPRESS_OIDC_ISSUER needs MODELPRESS_OIDC_AUDIENCE: tokens for others must not open this"
            )
        return self

    def resolved_database_url(self) -> str:
        """The database URL, with psycopg 3 as PostgreSQL's driver."""
        if not self.database_url:
            return f"sqlite:///{self.data_dir.absolute() / 'modelpress.sqlite3'}"
        for scheme in ("postgresql://", "postgres://"):
            if self.database_url.startswith(scheme):
                return "postgresql+psycopg://" + self.database_url.removeprefix(scheme)
        return self.database_url

    def memory_for(self, budget: int | None) -> int:
        """Bytes a job may use here: what it asked for, and never more than this worker has to give."""
        return min(budget or self.worker_memory_bytes, self.worker_memory_bytes)

    @property
    def scratch_dir(self) -> Path:
        """Where jobs work; one directory each, removed when the job has ended."""
        return self.data_dir.absolute() / "scratch"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`, or calls from there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process."""
    return Settings()
