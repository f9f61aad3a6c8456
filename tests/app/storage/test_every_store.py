"""What every store of blobs does, on the disk and in S3: whole or not there, and gone when nothing refers to it."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.access import DEFAULT_TENANT
from app.db import model_queries
from app.db.engine import Database
from app.db.tables import Dataset
from app.errors import NotFound
from app.ids import new_id
from app.storage import ArtifactStore
from app.storage.references import remove_orphans, remove_unreferenced

CONTENT = b"some bytes"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_a_file_that_was_put_is_there_under_its_digest(any_store: ArtifactStore, file: Path) -> None:
    any_store.check()
    assert not any_store.exists(DIGEST)
    any_store.put_file(file, DIGEST)
    assert any_store.exists(DIGEST)
    with any_store.open(DIGEST) as blob:
        assert blob.read() == CONTENT
        blob.seek(5)
        assert blob.read(3) == CONTENT[5:8]
    any_store.put_file(file, DIGEST)
    assert [(blob.sha256, blob.bytes) for blob in any_store.iter_blobs()] == [(DIGEST, len(CONTENT))]
    assert file.exists()


@pytest.mark.parametrize("size", [0, 8 * 2**20, 20 * 2**20 + 3])
def test_files_of_every_size_come_back_as_they_were(
    any_store: ArtifactStore, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(size))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    beats: list[None] = []
    any_store.put_file(path, sha256, beat=lambda: beats.append(None))
    any_store.materialize(sha256, tmp_path / "copy", beat=lambda: beats.append(None))
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    with any_store.open(sha256) as blob:
        assert hashlib.file_digest(blob, "sha256").hexdigest() == sha256
    assert beats or not size
    assert any_store.remove_unfinished(older_than_seconds=-5) == 0


def test_a_transfer_is_broken_off_by_its_beat_and_leaves_nothing(
    any_store: ArtifactStore, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(20 * 2**20))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def stop() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        any_store.put_file(path, sha256, beat=stop)
    assert not any_store.exists(sha256)
    assert any_store.remove_unfinished(older_than_seconds=-5) == 0


def test_many_threads_may_put_the_same_blob(any_store: ArtifactStore, tmp_path: Path) -> None:
    def put(number: int) -> None:
        path = tmp_path / f"copy{number}"
        path.write_bytes(CONTENT)
        any_store.put_file(path, DIGEST)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(16)))
    assert [blob.bytes for blob in any_store.iter_blobs()] == [len(CONTENT)]
    assert any_store.remove_unfinished(older_than_seconds=-5) == 0


def test_a_stream_is_hashed_on_the_way(any_store: ArtifactStore) -> None:
    info = any_store.put_stream(iter([CONTENT[:3], CONTENT[3:]]))
    assert (info.sha256, info.bytes) == (DIGEST, len(CONTENT))
    assert any_store.exists(DIGEST)


def test_a_stream_that_breaks_leaves_nothing(any_store: ArtifactStore) -> None:
    def chunks() -> Iterator[bytes]:
        yield CONTENT
        raise ConnectionError

    with pytest.raises(ConnectionError):
        any_store.put_stream(chunks())
    assert not list(any_store.iter_blobs())
    assert any_store.remove_unfinished(older_than_seconds=-5) == 0


def test_a_materialized_blob_is_read_only_and_outlives_the_blob(
    any_store: ArtifactStore, file: Path, tmp_path: Path
) -> None:
    any_store.put_file(file, DIGEST)
    target = tmp_path / "job" / "input" / "model.safetensors"
    any_store.materialize(DIGEST, target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o444
    assert any_store.delete(DIGEST)
    assert not any_store.delete(DIGEST)
    assert target.read_bytes() == CONTENT


def test_a_missing_blob_says_so(any_store: ArtifactStore, tmp_path: Path) -> None:
    for call in (any_store.open, lambda digest: any_store.materialize(digest, tmp_path / "x")):
        with pytest.raises(NotFound) as error:
            call(DIGEST)
        assert error.value.code == "blob_missing"


@pytest.mark.parametrize("name", ["../../etc/passwd", "ABC", DIGEST.upper(), DIGEST + "\n"])
def test_nothing_but_a_digest_names_a_blob(any_store: ArtifactStore, name: str) -> None:
    with pytest.raises(ValueError, match="no sha256"):
        any_store.exists(name)


def dataset(sha256: str) -> Dataset:
    return Dataset(id=new_id("dst"), name="a", format="txt", bytes=1, sha256=sha256)


def test_only_blobs_without_references_are_removed(
    any_store: ArtifactStore, any_database: Database, file: Path
) -> None:
    other = any_store.put_stream(iter([b"other"])).sha256
    any_store.put_file(file, DIGEST)
    with any_database.for_tenant(DEFAULT_TENANT).write() as session:
        model_queries.add_dataset(session, dataset(DIGEST))
    assert remove_unreferenced(any_database, any_store, {DIGEST, other}) == 1
    assert [blob.sha256 for blob in any_store.iter_blobs()] == [DIGEST]


def test_a_blob_put_while_another_reference_goes_is_kept(
    any_store: ArtifactStore, any_database: Database, file: Path
) -> None:
    """One thread drops the last reference and collects; the other has begun to publish the same blob."""
    any_store.put_file(file, DIGEST)
    holding = threading.Event()

    def publish() -> None:
        with any_database.for_tenant(DEFAULT_TENANT).write() as session:
            model_queries.hold_blobs(session)
            holding.set()
            any_store.put_file(file, DIGEST)
            threading.Event().wait(0.3)
            model_queries.add_dataset(session, dataset(DIGEST))

    publisher = threading.Thread(target=publish)
    publisher.start()
    holding.wait(10)
    assert remove_unreferenced(any_database, any_store, {DIGEST}) == 0
    publisher.join()
    assert any_store.exists(DIGEST)


def test_orphans_go_once_they_are_old(database: Database, any_store: ArtifactStore, file: Path) -> None:
    any_store.put_file(file, DIGEST)
    assert remove_orphans(database, any_store) == 0
    assert remove_orphans(database, any_store, older_than_seconds=-5) == 1
    assert not any_store.exists(DIGEST)
