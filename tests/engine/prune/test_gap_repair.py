from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import facts_of, tiny_model
from torch import Tensor

from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from workers.engine.architectures.block_removal import remove_blocks
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.block_stream import Calibration
from workers.engine.calibration.windows import model_windows
from workers.engine.distill.blocks import blocks_of
from workers.engine.prune.gap_repair import GapRepair, repaired
from workers.engine.prune.least_squares import LeastSquares

# A gated block; one that keeps weights as (in, out), with biases; attention beside the feed-forward part; a factor.
KINDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {},
    "CohereForCausalLM": {},
    "GraniteForCausalLM": {"residual_multiplier": 0.3},
}
# By those before the gaps: the first block has none, and the last gap has no block behind it.
DROPPED, BEFORE_GAPS, BEHIND_GAPS = [0, 2, 4, 5], {1: 0, 3: 1}, {1: 2, 3: 5}


def _repaired(directory: Path, text: Path, spool: Path) -> tuple[GapRepair, Tensor]:
    windows = model_windows(load_tokenizer(directory), text, facts_of(directory), tokens=768, length=48)
    calibration = Calibration(
        directory=directory, windows=windows, spool_directory=spool, device="cpu", progress=lambda *_: None
    )
    return repaired(calibration, DROPPED), windows


@torch.inference_mode()
def _states(directory: Path, windows: Tensor) -> list[Tensor]:
    """What leaves each block."""
    model = load_model(directory)
    seen: list[Tensor] = []
    for block in blocks_of(model):
        block.register_forward_hook(
            lambda _block, _arguments, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    model(windows, use_cache=False)
    return seen


def _distance(student: Tensor, teacher: Tensor) -> float:
    return float(((student - teacher).square().sum(-1) / teacher.square().sum(-1)).mean())


@pytest.mark.parametrize("architecture", KINDS)
def test_the_written_model_is_as_near_behind_each_gap_as_is_said(
    architecture: str, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny_model(architecture, tmp_path / "source", **_six_blocks(architecture), **KINDS[architecture])
    repair, windows = _repaired(source, tiny_text, tmp_path)
    remove_blocks(
        source,
        tmp_path / "out",
        DROPPED,
        replaced=repair.tensors,
        max_shard_bytes=10**9,
        progress=lambda *_: None,
    )
    teacher, student = (_states(directory, windows) for directory in (source, tmp_path / "out"))
    for (before, after), (kept, new) in zip(repair.errors, BEFORE_GAPS.items(), strict=True):
        assert after < 0.9 * before
        assert _distance(student[new], teacher[BEHIND_GAPS[kept]]) == pytest.approx(after, rel=1e-3)


def _six_blocks(architecture: str) -> dict[str, int]:
    return {"n_layer" if architecture.startswith("GPT2") else "num_hidden_layers": 6}


def test_a_gap_at_the_beginning_stays(tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path) -> None:
    directory = tiny("LlamaForCausalLM")
    windows = model_windows(load_tokenizer(directory), tiny_text, facts_of(directory), tokens=96, length=48)
    calibration = Calibration(
        directory=directory, windows=windows, spool_directory=tmp_path, device="cpu", progress=lambda *_: None
    )
    assert repaired(calibration, [0, 1]) == GapRepair()


def test_least_squares_is_the_damped_one_in_float64() -> None:
    torch.manual_seed(0)
    inputs, missing, weights = torch.randn(300, 7), torch.randn(300, 3), torch.rand(300)
    fit = LeastSquares(has_bias=True)
    for start in (0, 100):
        span = slice(start, start + 100 if start == 0 else None)
        fit.add(inputs[span], missing[span], weights[span])
    change, left = fit.solved()
    X = torch.cat([inputs, torch.ones(300, 1)], dim=1).double()
    R, w = missing.double(), weights.double()[:, None]
    gram = X.T @ (w * X)
    expected = torch.linalg.solve(gram + 8 / 300 * gram.diagonal().diag(), X.T @ (w * R))
    torch.testing.assert_close(change, expected.T.float())
    assert left == pytest.approx(float((w * (R - X @ expected) ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("step", "pointer"),
    [
        ({"technique": "prune.depth", "repair": True}, "/steps/0/repair"),
        (
            {"technique": "distill.logits", "student": {"source": "depth_cut", "repair": True}},
            "/steps/0/student/repair",
        ),
    ],
)
def test_where_no_layer_can_make_up_for_blocks_a_repair_is_refused(
    step: dict[str, Any], pointer: str, tiny: Callable[[str], Path]
) -> None:
    spec = CompressionSpec.model_validate({"steps": [step], "training": {}})
    faults = check_spec(spec, facts_of(tiny("Gemma2ForCausalLM")))
    assert [fault.pointer for fault in faults] == [pointer]
    assert check_spec(spec, facts_of(tiny("LlamaForCausalLM"))) == []
