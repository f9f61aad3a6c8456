"""Streaming checkpoint I/O against the safetensors library, which shares no code with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.errors import IntakeError, StorageFull
from app.spec.facts import TensorFact
from workers.engine.checkpoint import DTYPE_NAMES, Checkpoint, CheckpointWriter
from workers.engine.checkpoint.writeback import Writeback

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(37, 65, generator=generator).to(torch.bfloat16),
        "odd": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "codes": torch.randint(-(2**31), 2**31 - 1, (5, 3), generator=generator).to(torch.int32),
        "shape": torch.tensor([37, 65]),
        "mask": torch.tensor([True, False, True]),
        "cube": torch.randn(4, 3, 2, generator=generator).to(torch.float16),
        "empty": torch.zeros(0, 8),
    }


def facts_of(tensors: Tensors) -> list[TensorFact]:
    return [
        TensorFact(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def write_all(directory: Path, tensors: Tensors, max_shard_bytes: int = 10**9) -> None:
    with CheckpointWriter(directory, facts_of(tensors), max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def save_checkpoint(directory: Path, tensors: Tensors) -> Checkpoint:
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(directory)


def load_all(directory: Path) -> Tensors:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def test_reader_gives_what_the_library_wrote(tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = save_checkpoint(tmp_path, tensors)
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors)


def test_rows_are_the_rows_of_the_whole(tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = save_checkpoint(tmp_path, tensors)
    slabs = [(0, 10), (10, 20), (20, 30), (30, 37)]
    assert torch.equal(torch.cat([checkpoint.read_rows("wide", *slab) for slab in slabs]), tensors["wide"])
    assert torch.equal(checkpoint.read_rows("cube", 1, 3), tensors["cube"][1:3])


def test_rows_can_be_read_into_a_reused_buffer(tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = save_checkpoint(tmp_path, tensors)
    buffer = torch.zeros(4096, dtype=torch.uint8)
    rows = checkpoint.read_rows("wide", 3, 8, out=buffer)
    assert torch.equal(rows, tensors["wide"][3:8])
    assert rows.data_ptr() == buffer.data_ptr()


def test_entries_are_in_file_order(tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = save_checkpoint(tmp_path, tensors)
    offsets = [entry.offset for entry in checkpoint.tensors.values()]
    assert offsets == sorted(offsets)
    assert {fact.name: fact for fact in checkpoint.facts()} == {fact.name: fact for fact in facts_of(tensors)}


def test_library_reads_a_single_file(tmp_path: Path, tensors: Tensors) -> None:
    write_all(tmp_path, tensors)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_library_reads_shards_and_the_index_names_them(tmp_path: Path, tensors: Tensors) -> None:
    write_all(tmp_path, tensors, max_shard_bytes=4900)
    assert_same(load_all(tmp_path), tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert index["metadata"]["total_size"] == sum(fact.nbytes for fact in facts_of(tensors))


def test_our_reader_reads_our_shards(tmp_path: Path, tensors: Tensors) -> None:
    write_all(tmp_path, tensors, max_shard_bytes=200)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors)


def test_rows_may_come_in_any_order(tmp_path: Path, tensors: Tensors) -> None:
    wide = {"wide": tensors["wide"]}
    with CheckpointWriter(tmp_path, facts_of(wide), 10**9) as writer:
        for start, stop in ((20, 37), (0, 5), (5, 20)):
            writer.write_rows("wide", start, wide["wide"][start:stop])
    assert_same(load_all(tmp_path), wide)


def test_a_window_of_writeback_loses_nothing(tmp_path: Path) -> None:
    big = {"big": torch.arange(3 * 2**23, dtype=torch.int32).view(-1, 2**16)}
    with CheckpointWriter(tmp_path, facts_of(big), 10**9) as writer:
        for start in range(0, big["big"].shape[0], 16):
            writer.write_rows("big", start, big["big"][start : start + 16])
    assert_same(load_all(tmp_path), big)


def test_files_are_readable_by_all_whatever_the_umask(tmp_path: Path, tensors: Tensors) -> None:
    before = os.umask(0o077)
    try:
        write_all(tmp_path, tensors, max_shard_bytes=4900)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("rows", [((0, 5), (7, 37)), ((0, 36),), ((0, 20), (19, 37)), ()])
def test_missing_or_doubled_rows_are_an_error_and_leave_nothing(
    tmp_path: Path, tensors: Tensors, rows: tuple[tuple[int, int], ...]
) -> None:
    wide = {"wide": tensors["wide"]}

    def write_some() -> None:
        with CheckpointWriter(tmp_path, facts_of(wide), 10**9) as writer:
            for start, stop in rows:
                writer.write_rows("wide", start, wide["wide"][start:stop])

    with pytest.raises(RuntimeError, match="wide"):
        write_some()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_removes_what_was_written_and_nothing_else(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "config.json").write_text("{}")

    def interrupted() -> None:
        with CheckpointWriter(tmp_path, facts_of(tensors), 200) as writer:
            writer.write("wide", tensors["wide"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_shows_before_the_work(tmp_path: Path) -> None:
    fact = TensorFact(name="huge", dtype="F32", shape=(2**30, 2**12))
    with pytest.raises(StorageFull), CheckpointWriter(tmp_path, [fact], 10**15):
        raise AssertionError("the writer should have refused")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_shape_or_dtype_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    wide = {"wide": tensors["wide"]}
    for wrong in (tensors["wide"].float(), tensors["wide"][:, :5]):
        with (
            pytest.raises(ValueError, match="announced"),
            CheckpointWriter(tmp_path, facts_of(wide), 10**9) as w,
        ):
            w.write("wide", wrong)


def test_closing_a_file_twice_does_nothing(tmp_path: Path) -> None:
    file = Writeback(tmp_path / "file", 3)
    file.write(memoryview(b"abc"), 0)
    file.close(sync=True)
    file.close(sync=False)
    assert (tmp_path / "file").read_bytes() == b"abc"


def damaged(tmp_path: Path, tensors: Tensors, content: bytes) -> None:
    save_checkpoint(tmp_path, tensors)
    (tmp_path / "model.safetensors").write_bytes(content)


def test_a_truncated_file_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, tensors)
    file = tmp_path / "model.safetensors"
    for length in (0, 4, 30, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(IntakeError, match="damaged"):
            Checkpoint.open(tmp_path)


def test_a_header_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    span = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    header = json.dumps({"x": span}).encode()
    damaged(tmp_path, {"x": torch.zeros(2)}, len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(IntakeError, match="x has 8 bytes"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(IntakeError, match=r"x is both in a\.safetensors and in b\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IntakeError, match="no safetensors"):
        Checkpoint.open(tmp_path)
