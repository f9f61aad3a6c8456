from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import digests, tensors_of
from tiny_models import BLOCKS, INTERMEDIATE, changed, facts_of, tiny_model
from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import ARCHITECTURES
from app.spec.prune import PruneWidth
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.block_stream import Calibration, stream_blocks
from workers.engine.calibration.windows import model_windows
from workers.engine.checkpoint import Checkpoint
from workers.engine.prune.block_narrower import BlockNarrower
from workers.engine.prune.width import ChannelCut
from workers.engine.technique import StepContext, StepOutcome, run_step

STEP = PruneWidth(drop_ratio=0.5, round_to=16, calibration_tokens=512)


class Stopped(Exception):  # noqa: N818 - what a cancelled job raises is no error
    """Raised by progress to stop."""


def prune(step: PruneWidth, source: Path, target: Path, text: Path, **extra: Any) -> StepOutcome:
    target.mkdir(parents=True, exist_ok=True)
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text, **extra
    )
    return run_step(step, context)


def calibration(directory: Path, text: Path, spool: Path) -> Calibration:
    windows = model_windows(load_tokenizer(directory), text, facts_of(directory), tokens=192, length=48)
    spool.mkdir()
    return Calibration(
        directory=directory, windows=windows, spool_directory=spool, device="cpu", progress=lambda *_: None
    )


def outputs(
    calibrated: Calibration, narrower: BlockNarrower | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What each block gives, all windows: (blocks, windows, tokens, hidden); and what a narrower makes of them."""
    found: list[list[Tensor]] = [[] for _ in range(BLOCKS)]
    tensors: dict[str, Tensor] = {}

    def visit(index: int, _before: Tensor, after: Tensor) -> None:
        found[index].append(after)

    if narrower is None:
        stream_blocks(calibrated, visit)
    else:
        stream_blocks(calibrated, visit, prepare=lambda block: tensors.update(narrower.narrow(block)[0]))
    return torch.stack([torch.cat(parts) for parts in found]), tensors


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM", "OPTForCausalLM", "ModernBertModel", "DistilBertModel"],
)  # fmt: skip
def test_the_block_that_goes_on_computes_what_the_narrow_model_does(
    architecture: str, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source, target = tiny(architecture), tmp_path / "out"
    prune(STEP, source, target, tiny_text)
    cut = ChannelCut(ARCHITECTURES[architecture], before=INTERMEDIATE, after=INTERMEDIATE // 2)
    narrower = BlockNarrower(STEP, Checkpoint.open(source), ARCHITECTURES[architecture], cut)
    live, tensors = outputs(calibration(source, tiny_text, tmp_path / "live"), narrower)
    changed_by = {name: tensors.get(name, tensor) for name, tensor in tensors_of(source).items()}
    narrow = changed(target, tmp_path / "narrow", lambda stored: stored.update(changed_by))
    written, _ = outputs(calibration(narrow, tiny_text, tmp_path / "written"))
    torch.testing.assert_close(live, written, atol=1e-4, rtol=1e-4)
    whole, _ = outputs(calibration(source, tiny_text, tmp_path / "whole"))
    assert (whole - live).square().mean() > 1e-4 * whole.square().mean()


def test_a_bias_takes_the_mean_of_what_goes(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("OPTForCausalLM")
    opt = ARCHITECTURES["OPTForCausalLM"]
    cut = ChannelCut(opt, before=INTERMEDIATE, after=16)
    narrower = BlockNarrower(STEP, Checkpoint.open(source), opt, cut)
    narrow, _ = outputs(calibration(source, tiny_text, tmp_path / "narrow"), narrower)
    whole, _ = outputs(calibration(source, tiny_text, tmp_path / "whole"))
    # The first block's output is what it is given and what its feed-forward part gives.
    torch.testing.assert_close(narrow[0].mean((0, 1)), whole[0].mean((0, 1)), atol=1e-4, rtol=1e-4)
    assert (narrow[0] - whole[0]).abs().max() > 1e-2


def test_repair_leaves_outputs_closer(tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    errors = []
    for repair in (True, False):
        step = STEP.model_copy(update={"repair": repair})
        found = prune(step, source, tmp_path / str(repair), tiny_text).metrics["relative_output_error"]
        assert isinstance(found, float)
        errors.append(found)
    assert errors[0] < 0.8 * errors[1]


def test_without_repair_what_stays_is_as_it_was(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("BertModel")
    prune(STEP.model_copy(update={"repair": False}), source, tmp_path / "out", tiny_text)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for block in range(BLOCKS):
        name = f"encoder.layer.{block}.output.dense"
        columns = {tuple(column) for column in before[f"{name}.weight"].t().tolist()}
        assert {tuple(column) for column in after[f"{name}.weight"].t().tolist()} < columns
        assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])


def test_channels_that_never_carry_anything_go_first(tiny_text: Path, tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source")
    silent = range(5, 5 + INTERMEDIATE // 2)

    def silence(tensors: dict[str, Tensor]) -> None:
        for block in range(BLOCKS):
            tensors[f"model.layers.{block}.mlp.up_proj.weight"][silent] = 0
            # However strongly they are read.
            tensors[f"model.layers.{block}.mlp.down_proj.weight"][:, silent] *= 100

    given = changed(source, tmp_path / "silent", silence)
    outcome = prune(STEP, given, tmp_path / "out", tiny_text)
    assert outcome.metrics["relative_output_error"] == pytest.approx(0, abs=1e-5)
    assert "dead_inputs" in {flag.code for flag in outcome.flags}
    tokens = load_tokenizer(given)("The old mill is under the bridge.", return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(
            load_model(tmp_path / "out")(**tokens)[0], load_model(given)(**tokens)[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("block", range(1, BLOCKS + 1))
def test_stopped_at_any_block_it_ends_with_the_same_bytes(
    block: int, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source, journal = tiny("LlamaForCausalLM"), tmp_path / "journal"
    said: list[str] = []

    def stop(_share: float, _message: str) -> None:
        # Its tensors are written, and it is not finished.
        if (journal / f"block-{block - 1:05d}").exists():
            raise Stopped

    with pytest.raises(Stopped):
        prune(STEP, source, tmp_path / "stopped", tiny_text, journal=journal, progress=stop)
    prune(
        STEP, source, tmp_path / "resumed", tiny_text, journal=journal,
        progress=lambda _, message: said.append(message),
    )  # fmt: skip
    assert said[0].startswith(f"block {block} of")
    assert not journal.exists()
    prune(STEP, source, tmp_path / "whole", tiny_text)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_weights_keep_their_dtype_and_config_its_other_keys(tiny_text: Path, tmp_path: Path) -> None:
    source = tiny_model("GPT2LMHeadModel", tmp_path / "source", dtype=torch.float16, n_inner=None)
    prune(STEP, source, tmp_path / "out", tiny_text)
    assert {fact.dtype for fact in facts_of(tmp_path / "out").tensors} == {"F16"}
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    assert after == before | {"n_inner": 128}


@pytest.mark.parametrize(
    ("architecture", "round_to", "error"),
    [("MixtralForCausalLM", 16, UnsupportedForModel), ("BertModel", INTERMEDIATE, InvalidRequest)],
)
def test_what_could_not_be_narrowed_is_refused(
    architecture: str, round_to: int, error: type[Exception], tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:  # fmt: skip
    step = STEP.model_copy(update={"round_to": round_to})
    with pytest.raises(error, match=r"experts|No multiple of 128"):
        prune(step, tiny(architecture), tmp_path / "out", tiny_text)
