"""States that stay in the memory of the device that computes; here the CPU stands for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny_models import facts_of
from torch import Tensor

from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration import block_states
from workers.engine.calibration.block_states import StatesShape, open_states
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.windows import model_windows

SHAPE = StatesShape(windows=5, shape=(3, 4), dtype=torch.float32)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_states, "_fits", lambda _nbytes, _device: True)


@pytest.fixture
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_states, "_SECONDS_BETWEEN_COPIES", 0.0)


def _random() -> Tensor:
    return torch.randn(SHAPE.windows, *SHAPE.shape)


@pytest.mark.usefixtures("on_device", "always_due")
def test_states_that_were_kept_are_what_a_later_process_begins_with(tmp_path: Path) -> None:
    before, after = _random(), _random()
    with open_states(tmp_path, SHAPE, device="cpu", block=-1) as states:
        states.write(0, before)
        assert not states.passed(-1, keep=False)
        assert torch.equal(states.read(0, 5), before)
        states.write(0, after)
        assert states.passed(0, keep=True)
        states.write(0, before)
    with open_states(tmp_path, SHAPE, device="cpu", block=1) as states:
        assert torch.equal(states.read(1, 3), after[1:4])


@pytest.mark.usefixtures("on_device", "always_due")
def test_a_copy_never_goes_over_the_only_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_states(tmp_path, SHAPE, device="cpu", block=-1) as states:
        states.write(0, _random())
        states.passed(-1, keep=False)
        assert states.passed(0, keep=True)
        whole = (tmp_path / "states-1").read_bytes()
        monkeypatch.setattr(block_states, "_SECONDS_BETWEEN_COPIES", 1e9)
        assert not states.passed(1, keep=True)
        monkeypatch.setattr(block_states, "_SECONDS_BETWEEN_COPIES", 0.0)
        states.write(0, _random())
        assert not states.passed(2, keep=True)
        assert (tmp_path / "states-1").read_bytes() == whole
        assert states.passed(3, keep=True)


@pytest.mark.usefixtures("on_device")
def test_what_was_read_does_not_change_with_what_is_written(tmp_path: Path) -> None:
    with open_states(tmp_path, SHAPE, device="cpu", block=-1) as states:
        states.write(0, torch.ones(5, 3, 4))
        read = states.read(0, 2)
        states.write(0, torch.zeros(5, 3, 4))
        assert bool((read == 1).all())


def _blocks_seen(
    source: Path, windows: Tensor, spool: Path, first_block: int = 0, stop_after: int | None = None
) -> tuple[dict[int, Tensor], list[int]]:
    """What each block gave, and of which blocks it was said that all up to them are finished."""
    spool.mkdir(exist_ok=True)
    seen: dict[int, list[Tensor]] = {}
    finished: list[int] = []

    def prepare(block: LiveBlock) -> None:
        if stop_after is not None and block.index > stop_after:
            raise KeyboardInterrupt
        for parameter in block.module.parameters():
            parameter.mul_(0.9)

    def visit(index: int, _before: Tensor, after: Tensor) -> None:
        seen.setdefault(index, []).append(after.clone())

    calibration = Calibration(
        directory=source, windows=windows, spool_directory=spool, device="cpu", progress=lambda *_: None
    )
    with suppress(KeyboardInterrupt):
        stream_blocks(calibration, visit, prepare=prepare, finished=finished.append, first_block=first_block)
    return {index: torch.cat(parts) for index, parts in seen.items()}, finished


def test_blocks_give_the_same_wherever_states_are_and_after_a_stop(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("LlamaForCausalLM")
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=320, length=32)
    expected, finished = _blocks_seen(source, windows, tmp_path / "files")
    last = len(expected) - 1
    assert finished == list(range(last + 1))

    monkeypatch.setattr(block_states, "_fits", lambda _nbytes, _device: True)
    seen, finished = _blocks_seen(source, windows, tmp_path / "device")
    assert finished == [last]
    assert all(torch.equal(seen[index], expected[index]) for index in expected)

    monkeypatch.setattr(block_states, "_SECONDS_BETWEEN_COPIES", 0.0)
    _, finished = _blocks_seen(source, windows, tmp_path / "stopped", stop_after=1)
    assert finished == [0, 1]
    seen, finished = _blocks_seen(source, windows, tmp_path / "stopped", first_block=2)
    assert finished[-1] == last
    assert all(torch.equal(seen[index], expected[index]) for index in range(2, last + 1))
