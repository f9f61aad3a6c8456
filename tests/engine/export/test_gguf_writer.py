"""The streamed writer: rows in any order, and no file that lacks some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.errors import StorageFull
from app.spec.gguf_layout import FORMATS, GgufTensor
from workers.engine.export.gguf.writer import GgufFileWriter

TENSORS = (
    GgufTensor("a", "a.weight", (4, 32), FORMATS["Q4_0"]),
    GgufTensor("b", "b.weight", (3,), FORMATS["F32"]),
)
HEADER = b"h" * 64


def test_rows_lie_where_the_header_says_whatever_their_order(tmp_path: Path) -> None:
    rows = torch.arange(4 * 18, dtype=torch.uint8).view(4, 18)
    vector = torch.tensor([1.0, 2.0, 3.0])
    with GgufFileWriter(tmp_path / "m.gguf", HEADER, TENSORS) as writer:
        writer.write_rows("b.weight", 0, vector.view(3, 1).view(torch.uint8))
        writer.write_rows("a.weight", 2, rows[2:])
        writer.write_rows("a.weight", 0, rows[:2])
    content = (tmp_path / "m.gguf").read_bytes()
    assert content[:64] == HEADER
    assert content[64 : 64 + 72] == rows.numpy().tobytes()
    # 72 bytes are padded to 96, 12 to 32.
    assert content[64 + 96 : 64 + 96 + 12] == vector.numpy().tobytes()
    assert len(content) == 64 + 96 + 32
    assert (tmp_path / "m.gguf").stat().st_mode & 0o044 == 0o044


def test_a_file_with_rows_missing_is_removed(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"a\.weight"),
        GgufFileWriter(tmp_path / "m.gguf", HEADER, TENSORS) as writer,
    ):
        writer.write_rows("b.weight", 0, torch.zeros(3, 4, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="18 bytes"),
        GgufFileWriter(tmp_path / "m.gguf", HEADER, TENSORS) as writer,
    ):
        writer.write_rows("a.weight", 0, torch.zeros(4, 20, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_the_disk_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    huge = GgufTensor("c", "c.weight", (2**20, 2**32), FORMATS["Q8_0"])
    with pytest.raises(StorageFull), GgufFileWriter(tmp_path / "m.gguf", HEADER, (huge,)):
        pass
    assert list(tmp_path.iterdir()) == []
