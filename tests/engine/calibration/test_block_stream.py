from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import facts_of
from torch import Tensor

from app.spec import calibration_memory
from app.spec.calibration_memory import windows_at_once
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.architectures.skeleton import Skeleton
from workers.engine.calibration.block_stream import Calibration, stream_blocks
from workers.engine.calibration.hidden_states import HiddenStates
from workers.engine.calibration.windows import model_windows

WINDOWS, TOKENS, HIDDEN = 5, 3, 4


def test_states_are_found_where_they_were_written_one_by_one_or_several_at_once(tmp_path: Path) -> None:
    states = torch.randn(WINDOWS, TOKENS, HIDDEN)
    with HiddenStates(tmp_path / "states", WINDOWS, (TOKENS, HIDDEN), torch.float32) as file:
        file.write(3, states[3:])
        file.write(0, states[:1])
        file.write(1, states[1:3])
        assert torch.equal(file.read(0, WINDOWS), states)
        assert torch.equal(file.read(2, 2), states[2:4])
        assert all(torch.equal(file.read(n), states[n : n + 1]) for n in range(WINDOWS))
        file.write(1, -states[1:2])
        assert torch.equal(file.read(0, 3), torch.cat([states[:1], -states[1:2], states[2:3]]))


def test_states_are_kept_in_the_dtype_asked_for(tmp_path: Path) -> None:
    states = torch.randn(WINDOWS, TOKENS, HIDDEN)
    with HiddenStates(tmp_path / "states", WINDOWS, (TOKENS, HIDDEN), torch.bfloat16) as file:
        file.write(0, states)
        assert torch.equal(file.read(0, WINDOWS), states.bfloat16())


def test_as_many_windows_run_together_as_memory_for_one_large_one_allows() -> None:
    assert windows_at_once(512, 1024) == 2
    assert windows_at_once(64, 1536) == 10
    assert windows_at_once(2048, 14336) == 1


def test_no_block_stays_in_memory_once_the_calls_are_known(tiny: Callable[[str], Path]) -> None:
    window = torch.arange(8).unsqueeze(0)
    skeleton = Skeleton.open(tiny("LlamaForCausalLM"), window, "cpu", torch.float32)
    with torch.no_grad():
        skeleton.record_calls(window)
    assert {parameter.device.type for parameter in skeleton.blocks.parameters()} == {"meta"}


def test_windows_that_run_together_come_out_as_they_do_alone(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("LlamaForCausalLM")
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=320, length=32)

    def outputs(spool: Path) -> tuple[list[int], Tensor]:
        spool.mkdir()
        seen: list[Tensor] = []
        calibration = Calibration(
            directory=source, windows=windows, spool_directory=spool, device="cpu", progress=lambda *_: None
        )
        stream_blocks(calibration, lambda _index, _before, after: seen.append(after.clone()))
        return [len(part) for part in seen], torch.cat(seen)

    together, ours = outputs(tmp_path / "together")
    monkeypatch.setattr(calibration_memory, "_FEATURES_AT_ONCE", 1)
    alone, expected = outputs(tmp_path / "alone")
    assert max(together) > 1
    assert max(alone) == 1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
