"""Calibration shared among devices: two that are both the processor here, two GPUs where there are two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from technique_runs import digests
from tiny_models import facts_of
from torch import Tensor

from app.spec import calibration_memory
from app.spec.quantize import QuantizeCalibrated
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.device_shares import on_all, other_gpus
from workers.engine.calibration.input_moments import gather_moments, input_sites
from workers.engine.calibration.windows import model_windows
from workers.engine.technique import Progress, StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
STEP = QuantizeCalibrated(bits=4, group_size=16, calibration_tokens=640, sequence_length=32)


@pytest.fixture(autouse=True)
def _one_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else all windows of a tiny model are one part, and one device's.
    monkeypatch.setattr(calibration_memory, "_FEATURES_AT_ONCE", 1)
    monkeypatch.setattr(calibration_memory, "_GPU_FEATURES_AT_ONCE", 1)


def moments(source: Path, windows: Tensor, spool: Path, *more: str) -> tuple[list[Tensor], list[bytes]]:
    """H, mean and largest of every input, and the states between the last blocks as they lie on the disk."""
    spool.mkdir()
    found: list[Tensor] = []

    def prepare(block: LiveBlock) -> None:
        assert block.devices == ("cpu", *more)
        assert (block.shared is None) == (not more)
        if block.shared is not None:
            shares = block.shared()
            assert [len(list(share.inputs())) for share in shares] == [3, 2]
            assert shares[0].module is block.module is not shares[1].module
        names = [name.removesuffix(".weight") for name in block.stored_names if name.endswith("proj.weight")]
        sites = input_sites(block, names)
        gather_moments(block, sites)
        found.extend(site.mean() for site in sites)
        found.extend(torch.tensor([site.peak(), site.tokens]) for site in sites)
        found.extend(site.second_moment() for site in sites)

    calibration = Calibration(
        directory=source, windows=windows, spool_directory=spool, device="cpu", more_devices=more,
        progress=lambda *_: None,
    )  # fmt: skip
    stream_blocks(calibration, prepare=prepare)
    return found, [(spool / f"states-{parity}").read_bytes() for parity in (0, 1)]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_what_two_devices_sum_up_is_what_one_does(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny(architecture)
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=5 * 32, length=32)
    alone, states = moments(source, windows, tmp_path / "alone")
    shared, same_states = moments(source, windows, tmp_path / "shared", "cpu")
    # Each window goes through the blocks as it did.
    assert states == same_states
    for one, two in zip(alone, shared, strict=True):
        # Sums of other parts: float32's last digits.
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def run(
    source: Path, target: Path, text: Path, *, device: str, more: tuple[str, ...],
    journal: Path | None = None, progress: Progress = lambda *_: None,
) -> StepOutcome:  # fmt: skip
    target.mkdir()
    return run_step(
        STEP,
        StepContext(
            source=source, target=target, original=source, facts=facts_of(source), calibration_text=text,
            device=device, more_devices=more, journal=journal, progress=progress,
        ),
    )  # fmt: skip


def test_what_is_quantized_with_three_is_as_good_and_goes_on_after_a_stop_to_the_same_bytes(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source, journal, more = tiny("LlamaForCausalLM"), tmp_path / "journal", ("cpu", "cpu")
    alone = run(source, tmp_path / "alone", tiny_text, device="cpu", more=())
    shared = run(source, tmp_path / "shared", tiny_text, device="cpu", more=more)
    lost = [float(outcome.metrics["relative_output_error"] or 0) for outcome in (alone, shared)]
    assert lost[1] == pytest.approx(lost[0], rel=0.01)

    def stop(_share: float, _message: str) -> None:
        if (journal / "block-00001.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "stopped", tiny_text, device="cpu", more=more, journal=journal, progress=stop)
    assert (journal / "block-00001.json").exists()
    run(source, tmp_path / "resumed", tiny_text, device="cpu", more=more, journal=journal)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "shared")


def test_what_fails_on_another_device_fails_the_whole() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("of the second")
        done.append(number)

    with pytest.raises(ValueError, match="of the second"):
        on_all(work, [0, 1, 2], ("cpu", "cpu", "cpu"))
    assert sorted(done) == [0, 2]


def test_a_job_on_the_processor_has_no_other_device() -> None:
    assert other_gpus("cpu") == ()


@pytest.mark.gpu
def test_two_gpus_find_what_one_does(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    source = tiny("LlamaForCausalLM")
    alone = run(source, tmp_path / "alone", tiny_text, device="cuda", more=())
    shared = run(source, tmp_path / "shared", tiny_text, device="cuda", more=("cuda:1",))
    lost = [float(outcome.metrics["relative_output_error"] or 0) for outcome in (alone, shared)]
    assert lost[1] == pytest.approx(lost[0], rel=0.01)
