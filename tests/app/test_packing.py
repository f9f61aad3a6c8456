"""A directory as one file to upload."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from app.packing import packed


def make_model(root: Path) -> Path:
    (root / "1_Pooling").mkdir(parents=True)
    (root / ".cache").mkdir()
    (root / "model.safetensors").write_bytes(b"weights")
    (root / "1_Pooling" / "config.json").write_text("{}")
    (root / ".cache" / "secret").write_text("x")
    return root


def test_a_directory_becomes_a_tar_of_its_visible_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"tokens")
    model = make_model(tmp_path / "model")
    (model / "tokenizer.json").symlink_to(tmp_path / "blob")
    with packed(model) as archive:
        assert archive.name == "model.tar"
        with tarfile.open(archive) as tar:
            content = {member.name: tar.extractfile(member) for member in tar}
            assert {name: file and file.read() for name, file in content.items()} == {
                "1_Pooling/config.json": b"{}",
                "model.safetensors": b"weights",
                "tokenizer.json": b"tokens",
            }
    assert not archive.exists()


def test_the_same_files_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = make_model(tmp_path / "a" / "model"), make_model(tmp_path / "b" / "model")
    os.utime(second / "model.safetensors", (1, 1))
    (second / "model.safetensors").chmod(0o600)
    with packed(first) as one, packed(second) as other:
        assert one.read_bytes() == other.read_bytes()


def test_a_file_goes_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with packed(file) as same:
        assert same == file
    assert file.exists()
