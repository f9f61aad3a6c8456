"""A step over blocks that is killed goes on at the block it was at, and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from technique_runs import digests
from tiny_models import BLOCKS, facts_of

from app.spec.compression import CompressionSpec
from app.spec.prune import PruneCalibrated
from app.spec.quantize import QuantizeCalibrated
from workers.engine.calibration.block_journal import open_journal
from workers.engine.technique import StepContext, run_step

QUANTIZE = QuantizeCalibrated(bits=3, group_size=16, kv_cache="fp8", calibration_tokens=256)
# What is drawn must be drawn again.
PRUNE = PruneCalibrated(criterion="random", calibration_tokens=256)

# Runs the step, and kills itself without warning in the middle of a block.
_CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_models import facts_of
from app.spec.compression import CompressionSpec
from workers.engine.technique import StepContext, run_step

source, target, text, journal, block = sys.argv[2:]

def progress(share, message):
    # Its tensors are written, and it is not finished.
    if Path(journal, block).exists():
        os.kill(os.getpid(), signal.SIGKILL)

run_step(
    CompressionSpec.model_validate_json(sys.stdin.read()).steps[0],
    StepContext(
        source=Path(source), target=Path(target), original=Path(source), facts=facts_of(Path(source)),
        calibration_text=Path(text), journal=Path(journal), progress=progress,
    ),
)
"""


def context(source: Path, target: Path, text: Path, journal: Path, said: list[str]) -> StepContext:
    target.mkdir(parents=True, exist_ok=True)
    return StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text,
        journal=journal, progress=lambda _, message: said.append(message),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "block"), [(QUANTIZE, block) for block in range(1, BLOCKS + 1)] + [(PRUNE, 2)], ids=str
)
def test_killed_at_any_block_it_ends_with_the_same_bytes(
    step: QuantizeCalibrated | PruneCalibrated,
    block: int,
    tiny: Callable[[str], Path],
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    source, journal = tiny("LlamaForCausalLM"), tmp_path / "journal"
    (tmp_path / "killed").mkdir()
    killed = subprocess.run(
        [
            sys.executable, "-c", _CHILD, str(Path(__file__).parents[1]), str(source), str(tmp_path / "killed"),
            str(tiny_text), str(journal), f"block-{block - 1:05d}",
        ],
        input=CompressionSpec(steps=(step,)).model_dump_json(), text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    said: list[str] = []
    run_step(step, context(source, tmp_path / "resumed", tiny_text, journal, said))
    assert said[0].startswith(f"block {block} of")
    assert not journal.exists()
    run_step(step, context(source, tmp_path / "whole", tiny_text, tmp_path / "other", []))
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def interrupted(directory: Path, key: str) -> None:
    """Finish one block and break off."""
    opened = open_journal(directory / "journal", directory, key)
    journal = opened.__enter__()
    journal.put(0, {})
    journal.commit(0, {"said": 1})
    assert not opened.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_the_same_work_goes_on_where_it_was(tmp_path: Path) -> None:
    interrupted(tmp_path, "one")
    with open_journal(tmp_path / "journal", tmp_path, "one") as journal:
        assert journal.blocks_done == 1
        assert journal.records() == [{"said": 1}]


def test_other_work_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path, "one")
    with open_journal(tmp_path / "journal", tmp_path, "another") as journal:
        assert journal.blocks_done == 0
        assert [file.name for file in journal.directory.iterdir()] == ["key"]


def test_a_journal_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    with open_journal(tmp_path / "journal", tmp_path, "one") as first:
        with open_journal(tmp_path / "journal", tmp_path, "one") as second:
            assert second.directory != first.directory
        assert first.directory.is_dir()
        assert not second.directory.exists()
    assert list(tmp_path.iterdir()) == []
