"""Blobs on disk: one file each, read only, shared by links; and the staging area beside them."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from app.errors import StorageFull
from app.storage.local import LocalStore
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


def test_a_blob_is_a_read_only_file_named_by_its_digest(store: LocalStore, file: Path) -> None:
    store.put_file(file, DIGEST)
    assert store.path_of(DIGEST).relative_to(file.parent).as_posix() == f"blobs/{DIGEST[:2]}/{DIGEST}"
    assert stat.S_IMODE(store.path_of(DIGEST).stat().st_mode) == 0o444


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


def test_a_stream_onto_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageFull):
        LocalStore(tmp_path, min_free_bytes=2**60).put_stream(iter([CONTENT]))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


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


def test_what_a_killed_process_left_half_put_is_removed(
    store: LocalStore, file: Path, tmp_path: Path
) -> None:
    store.put_file(file, DIGEST)
    (tmp_path / "staging" / "incoming" / "0123456789abcdef").write_bytes(b"half")
    assert store.remove_unfinished(older_than_seconds=60) == 0
    assert store.remove_unfinished(older_than_seconds=-1) == 1
    assert not list((tmp_path / "staging" / "incoming").iterdir())
    assert store.exists(DIGEST)
