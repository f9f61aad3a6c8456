"""Blobs on disk: whole or not there, read only, shared, and gone when nothing refers to them."""

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
from app.errors import NotFound, StorageFull
from app.ids import new_id
from app.storage.local import LocalStore
from app.storage.references import remove_orphans, remove_unreferenced
from app.storage.staging import Staging

CONTENT = b"some bytes"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_a_file_that_was_put_is_there_under_its_digest(store: LocalStore, file: Path) -> None:
    assert not store.exists(DIGEST)
    store.put_file(file, DIGEST)
    assert store.exists(DIGEST)
    with store.open(DIGEST) as blob:
        assert blob.read() == CONTENT
    assert store.path_of(DIGEST).relative_to(file.parent).as_posix() == f"blobs/{DIGEST[:2]}/{DIGEST}"
    assert stat.S_IMODE(store.path_of(DIGEST).stat().st_mode) == 0o444
    assert file.exists()


def test_putting_again_is_as_much_work_so_that_its_time_tells_nobody_of_anothers_file(
    store: LocalStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("link", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    store.put_file(file, DIGEST)
    first = list(calls)
    store.put_file(file, DIGEST)
    assert calls == first * 2
    assert {"link", "fsync"} <= set(first)


def test_putting_again_changes_nothing_but_the_time(store: LocalStore, file: Path) -> None:
    store.put_file(file, DIGEST)
    os.utime(store.path_of(DIGEST), (0, 0))
    inode = store.path_of(DIGEST).stat().st_ino
    store.put_file(file, DIGEST)
    after = store.path_of(DIGEST).stat()
    assert after.st_ino == inode
    assert after.st_mtime > 0
    assert [blob.sha256 for blob in store.iter_blobs()] == [DIGEST]


def test_many_threads_may_put_the_same_blob(store: LocalStore, tmp_path: Path) -> None:
    def put(number: int) -> None:
        path = tmp_path / f"copy{number}"
        path.write_bytes(CONTENT)
        store.put_file(path, DIGEST)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(32)))
    assert [blob.bytes for blob in store.iter_blobs()] == [len(CONTENT)]
    assert not list((tmp_path / "staging" / "incoming").iterdir())


def test_a_stream_is_hashed_on_the_way(store: LocalStore) -> None:
    info = store.put_stream(iter([CONTENT[:3], CONTENT[3:]]))
    assert (info.sha256, info.bytes) == (DIGEST, len(CONTENT))
    assert store.exists(DIGEST)


def test_a_stream_that_breaks_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield CONTENT
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.put_stream(chunks())
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_stream_onto_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageFull):
        LocalStore(tmp_path, min_free_bytes=2**60).put_stream(iter([CONTENT]))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_materialized_blob_is_read_only_and_outlives_the_blob(
    store: LocalStore, file: Path, tmp_path: Path
) -> None:
    store.put_file(file, DIGEST)
    target = tmp_path / "job" / "input" / "model.safetensors"
    store.materialize(DIGEST, target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o444
    assert store.delete(DIGEST)
    assert not store.delete(DIGEST)
    assert target.read_bytes() == CONTENT


def test_a_missing_blob_says_so(store: LocalStore, tmp_path: Path) -> None:
    for call in (store.open, store.path_of, lambda digest: store.materialize(digest, tmp_path / "x")):
        with pytest.raises(NotFound) as error:
            call(DIGEST)
        assert error.value.code == "blob_missing"


@pytest.mark.parametrize("name", ["../../etc/passwd", "ABC", DIGEST.upper(), DIGEST + "\n"])
def test_nothing_but_a_digest_names_a_blob(store: LocalStore, name: str) -> None:
    with pytest.raises(ValueError, match="no sha256"):
        store.exists(name)


def dataset(sha256: str) -> Dataset:
    return Dataset(id=new_id("dst"), name="a", format="txt", bytes=1, sha256=sha256)


def test_only_blobs_without_references_are_removed(
    any_database: Database, store: LocalStore, file: Path
) -> None:
    other = store.put_stream(iter([b"other"])).sha256
    store.put_file(file, DIGEST)
    with any_database.for_tenant(DEFAULT_TENANT).write() as session:
        model_queries.add_dataset(session, dataset(DIGEST))
    assert remove_unreferenced(any_database, store, {DIGEST, other}) == 1
    assert [blob.sha256 for blob in store.iter_blobs()] == [DIGEST]


def test_a_blob_put_while_another_reference_goes_is_kept(
    any_database: Database, store: LocalStore, file: Path
) -> None:
    """One thread drops the last reference and collects; the other has begun to publish the same blob."""
    store.put_file(file, DIGEST)
    holding = threading.Event()

    def publish() -> None:
        with any_database.for_tenant(DEFAULT_TENANT).write() as session:
            model_queries.hold_blobs(session)
            holding.set()
            store.put_file(file, DIGEST)
            threading.Event().wait(0.3)
            model_queries.add_dataset(session, dataset(DIGEST))

    publisher = threading.Thread(target=publish)
    publisher.start()
    holding.wait(10)
    assert remove_unreferenced(any_database, store, {DIGEST}) == 0
    publisher.join()
    assert store.exists(DIGEST)


def test_orphans_go_once_they_are_old(database: Database, store: LocalStore, file: Path) -> None:
    store.put_file(file, DIGEST)
    assert remove_orphans(database, store) == 0
    os.utime(store.path_of(DIGEST), (0, 0))
    assert remove_orphans(database, store) == 1
    assert not store.exists(DIGEST)


def test_a_work_directory_is_gone_however_its_block_ends(tmp_path: Path) -> None:
    staging = Staging(tmp_path, min_free_bytes=0)

    def break_off() -> None:
        with staging.work_directory() as work:
            staged = work.write_all("a/b", iter([CONTENT]))
            assert (staged.sha256, staged.bytes) == (DIGEST, len(CONTENT))
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert not list((tmp_path / "work").iterdir())


def test_nothing_is_written_outside_a_work_directory(tmp_path: Path) -> None:
    staging = Staging(tmp_path, min_free_bytes=0)
    with staging.work_directory() as work, pytest.raises(ValueError, match="leaves"):
        work.write_all("../evil", iter([CONTENT]))
    assert not (tmp_path / "work" / "evil").exists()
