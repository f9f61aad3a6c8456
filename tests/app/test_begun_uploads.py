"""What the command line remembers of uploads that were broken off."""

from __future__ import annotations

import os
from pathlib import Path

from app.begun_uploads import BegunUploads


def test_an_upload_is_found_again_by_another_run_for_the_same_service_alone(tmp_path: Path) -> None:
    file, state = tmp_path / "model.gguf", tmp_path / "state" / "uploads.json"
    file.write_bytes(b"GGUF")
    BegunUploads("http://a", state).remember(file, "upl_1")
    assert BegunUploads("http://a", state).find(file) == "upl_1"
    assert BegunUploads("http://b", state).find(file) is None


def test_a_file_that_changed_is_another_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    begun = BegunUploads("http://a", tmp_path / "uploads.json")
    begun.remember(file, "upl_1")
    os.utime(file, ns=(1, 1))
    assert begun.find(file) is None


def test_what_is_used_up_is_forgotten_and_the_rest_kept(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    begun = BegunUploads("http://a", tmp_path / "uploads.json")
    for file in files:
        file.write_bytes(b"x")
        begun.remember(file, f"upl_{file.name}")
    begun.forget(files[0])
    assert [begun.find(file) for file in files] == [None, "upl_b"]


def test_a_broken_memory_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "uploads.json").write_text("{")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x")
    begun = BegunUploads("http://a", tmp_path / "uploads.json")
    assert begun.find(file) is None
    begun.remember(file, "upl_1")
    assert begun.find(file) == "upl_1"
