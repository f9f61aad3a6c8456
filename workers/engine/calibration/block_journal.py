"""What a step over blocks has finished, so that one that was killed goes on at the next block, to the same bytes.

key                   of what the step reads and is asked for; another key starts anew
states-0, states-1    hidden states between blocks (block_stream)
block-00003           tensors that block 3 became, as safetensors
block-00003.json      what is to be reported of it; written last, so a block with it is finished
directions and such   tensors that a step keeps beside those of its blocks
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.engine.checkpoint.layout import TensorEntry, read_entries


class BlockJournal:
    """The journal in a directory that is ours alone; see `open_journal`."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory = directory
        key_file = directory / "key"
        if not key_file.is_file() or key_file.read_text() != key:
            for path in directory.iterdir():
                path.unlink()
            key_file.write_text(key)
        self.blocks_done = 0
        while self._record(self.blocks_done).is_file():
            self.blocks_done += 1

    def put(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of a block; they count once it is committed."""
        # Written beside and renamed by the file system's own rules: a half-written one is simply written again.
        save_file(tensors, self._tensors(index))
        _sync(self._tensors(index))

    def commit(self, index: int, record: dict[str, Any]) -> None:
        """Note that a block is finished; its tensors and the states after it are on the disk."""
        unfinished = self.directory / "unfinished"
        with unfinished.open("w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._record(index))
        _sync(self.directory)
        self.blocks_done = index + 1

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors under a name of their own, as a whole or not at all."""
        unfinished = self.directory / "unfinished"
        save_file(tensors, unfinished)
        _sync(unfinished)
        unfinished.rename(self.directory / name)
        _sync(self.directory)

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """The tensors under a name, if they were written."""
        file = self.directory / name
        return load_file(file) if file.is_file() else None

    def records(self) -> list[dict[str, Any]]:
        """What was reported of each finished block, in order."""
        return [json.loads(self._record(index).read_text()) for index in range(self.blocks_done)]

    def entries(self) -> Iterator[TensorEntry]:
        """The tensors of all finished blocks."""
        for index in range(self.blocks_done):
            yield from read_entries(self._tensors(index))

    def _tensors(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}"

    def _record(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.json"


@contextmanager
def open_journal(directory: Path | None, scratch: Path, key: str) -> Iterator[BlockJournal]:
    """The journal in `directory`, which is removed when all went well and kept when it did not.

    Without a directory, or while a process that should be dead still holds it, a new one below `scratch` that is removed
    either way.
    """
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _locked(descriptor):
                yield BlockJournal(directory, key)
                shutil.rmtree(directory)
                return
        finally:
            os.close(descriptor)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="journal-") as own:
        yield BlockJournal(Path(own), key)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
