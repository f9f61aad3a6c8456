"""What only a store behind a network meets: refusal, absence, broken connections, damage, and being killed on the way."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cutting_proxy import cutting_proxy
from s3_server import BUCKET, S3Server
from waiting import wait_until

from app.errors import ModelpressError, Unavailable
from app.settings import Settings
from app.storage import get_store

UseS3 = Callable[..., Settings]
MIB = 2**20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(20 * MIB))
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key_of(settings: Settings, sha256: str) -> str:
    return f"{settings.store.removeprefix(f's3://{BUCKET}/')}/blobs/{sha256[:2]}/{sha256}"


def test_a_wrong_secret_is_refused(
    s3_server: S3Server, use_s3: UseS3, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    use_s3(s3_server)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-wrong-secret")
    for call in (get_store().check, lambda: get_store().put_file(file, sha256_of(file))):
        with pytest.raises(Unavailable, match="refuses us at bucket modelpress") as caught:
            call()
        assert "AWS_SECRET_ACCESS_KEY" in str(caught.value.hint)


def test_a_missing_bucket_is_named(s3_server: S3Server, use_s3: UseS3) -> None:
    use_s3(s3_server, store="s3://nobodys-bucket/x")
    with pytest.raises(Unavailable, match="no bucket nobodys-bucket") as caught:
        get_store().check()
    assert "MODELPRESS_STORE" in str(caught.value.hint)


def test_missing_credentials_are_asked_for(
    s3_server: S3Server, use_s3: UseS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(s3_server)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(Unavailable, match="no credentials"):
        get_store().check()


def test_connections_that_break_are_taken_up_again(
    s3_server: S3Server, use_s3: UseS3, file: Path, tmp_path: Path
) -> None:
    sha256 = sha256_of(file)
    with cutting_proxy(s3_server.url, 3 * MIB, 9 * MIB, direction="up") as proxy:
        use_s3(s3_server, s3_endpoint_url=proxy.url)
        get_store().put_file(file, sha256)
        assert proxy.connections > 2
    with cutting_proxy(s3_server.url, 1000, 3 * MIB, 9 * MIB, direction="down") as proxy:
        override = {"s3_endpoint_url": proxy.url, "store": os.environ["MODELPRESS_STORE"]}
        use_s3(s3_server, **override)
        get_store().materialize(sha256, tmp_path / "copy")
        assert proxy.connections > 3
    assert sha256_of(tmp_path / "copy") == sha256


def test_a_file_that_changed_after_it_was_hashed_is_not_kept(
    s3_server: S3Server, use_s3: UseS3, file: Path
) -> None:
    use_s3(s3_server)
    for content in (file.read_bytes(), b"small"):
        file.write_bytes(content)
        sha256 = sha256_of(file)
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(Unavailable) as caught:
            get_store().put_file(file, sha256)
        assert caught.value.code == "file_changed"
        assert not get_store().exists(sha256)
    assert get_store().remove_unfinished(older_than_seconds=-5) == 0


def test_a_damaged_blob_never_reaches_a_job(
    s3_server: S3Server, use_s3: UseS3, file: Path, tmp_path: Path
) -> None:
    settings = use_s3(s3_server)
    sha256 = sha256_of(file)
    get_store().put_file(file, sha256)
    damaged = file.read_bytes()[:-1] + b"!"
    s3_server.client().put_object(Bucket=BUCKET, Key=key_of(settings, sha256), Body=damaged)
    with pytest.raises(Unavailable) as caught:
        get_store().materialize(sha256, tmp_path / "scratch" / "copy")
    assert caught.value.code == "blob_damaged"
    assert not list((tmp_path / "scratch").iterdir())


SLOW_PUT = """
import sys, threading, time
from pathlib import Path
from app.storage import get_store, s3_transfer

send = s3_transfer._send_part
def send_two(client, upload, number, content):
    part = send(client, upload, number, content)
    if number == 2:
        print("half", flush=True)
        time.sleep(60)
    return part
s3_transfer._send_part = send_two
get_store().put_file(Path(sys.argv[1]), sys.argv[2])
"""


def test_killed_in_the_middle_of_a_put_leaves_nothing_to_be_seen(
    s3_server: S3Server, use_s3: UseS3, file: Path
) -> None:
    use_s3(s3_server)
    sha256 = sha256_of(file)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PUT, str(file), sha256], stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    store = get_store()
    assert not store.exists(sha256)
    assert not list(store.iter_blobs())
    assert store.remove_unfinished(older_than_seconds=3600) == 0
    assert store.remove_unfinished(older_than_seconds=-5) == 1
    assert store.remove_unfinished(older_than_seconds=-5) == 0
    store.put_file(file, sha256)
    assert store.exists(sha256)


def test_a_service_that_was_killed_has_what_was_put_and_nothing_half(
    own_s3_server: S3Server, use_s3: UseS3, file: Path, tmp_path: Path
) -> None:
    use_s3(own_s3_server)
    store, sha256 = get_store(), sha256_of(file)
    store.put_stream([b"here before"])
    own_s3_server.kill()
    began = time.monotonic()
    with pytest.raises(ModelpressError, match="does not answer"):
        store.put_file(file, sha256)
    assert time.monotonic() - began < 60
    own_s3_server.start()
    wait_until(lambda: not store.exists(sha256), seconds=30)
    store.put_file(file, sha256)
    store.materialize(sha256, tmp_path / "copy")
    assert sha256_of(tmp_path / "copy") == sha256
    assert len(list(store.iter_blobs())) == 2


PEAK = """
import resource, sys
from pathlib import Path
from app.storage import get_store

store = get_store()
store.check()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.put_file(Path(sys.argv[1]), sys.argv[2])
store.materialize(sys.argv[2], Path(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(s3_server: S3Server, use_s3: UseS3, tmp_path: Path) -> None:
    use_s3(s3_server)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(MIB) * 192)
    words = [sys.executable, "-c", PEAK, str(path), sha256_of(path), str(tmp_path / "copy")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
    assert int(done.stdout.splitlines()[-1]) < 128 * MIB
    assert sha256_of(tmp_path / "copy") == sha256_of(path)
