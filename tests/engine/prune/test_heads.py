from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import digests, tensors_of
from tiny_models import BLOCKS, HEAD_DIM, HEADS, KEY_VALUE_HEADS, changed, facts_of, tiny_model
from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import ARCHITECTURES
from app.spec.attention_heads import HeadCounts
from app.spec.prune import PruneHeads
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.block_stream import Calibration, stream_blocks
from workers.engine.calibration.windows import model_windows
from workers.engine.checkpoint import Checkpoint
from workers.engine.prune.block_narrower import BlockNarrower
from workers.engine.prune.channel_selection import refitted
from workers.engine.prune.head_selection import groups_hardest_to_replace, inputs_of_groups, strongest_groups
from workers.engine.prune.heads import HeadCut
from workers.engine.technique import StepContext, StepOutcome, run_step

STEP = PruneHeads(drop_ratio=0.5, calibration_tokens=512)
COUNTS = HeadCounts(groups=KEY_VALUE_HEADS, per_group=HEADS // KEY_VALUE_HEADS, size=HEAD_DIM)
# Separate and fused projections, with biases and without, norms of single heads, experts beside.
LAYOUTS = [
    "LlamaForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM", "Starcoder2ForCausalLM", "MixtralForCausalLM",
]  # fmt: skip


class Stopped(Exception):  # noqa: N818 - what a cancelled job raises is no error
    """Raised by progress to stop."""


def prune(step: PruneHeads, source: Path, target: Path, text: Path, **extra: Any) -> StepOutcome:
    target.mkdir(parents=True, exist_ok=True)
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text, **extra
    )
    return run_step(step, context)


def outputs(
    directory: Path, text: Path, spool: Path, narrower: BlockNarrower | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What each block gives, all windows: (blocks, windows, tokens, hidden); and what a narrower makes of them."""
    windows = model_windows(load_tokenizer(directory), text, facts_of(directory), tokens=192, length=48)
    spool.mkdir()
    given = Calibration(
        directory=directory, windows=windows, spool_directory=spool, device="cpu", progress=lambda *_: None
    )
    found: list[list[Tensor]] = [[] for _ in range(BLOCKS)]
    tensors: dict[str, Tensor] = {}

    def visit(index: int, _before: Tensor, after: Tensor) -> None:
        found[index].append(after)

    if narrower is None:
        stream_blocks(given, visit)
    else:
        stream_blocks(given, visit, prepare=lambda block: tensors.update(narrower.narrow(block)[0]))
    return torch.stack([torch.cat(parts) for parts in found]), tensors


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_the_block_that_goes_on_computes_what_the_model_with_fewer_heads_does(
    architecture: str, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source, target = tiny(architecture), tmp_path / "out"
    prune(STEP, source, target, tiny_text)
    cut = HeadCut(ARCHITECTURES[architecture], COUNTS, after=1)
    narrower = BlockNarrower(STEP, Checkpoint.open(source), ARCHITECTURES[architecture], cut)
    live, tensors = outputs(source, tiny_text, tmp_path / "live", narrower)
    changed_by = {name: tensors.get(name, tensor) for name, tensor in tensors_of(source).items()}
    narrow = changed(target, tmp_path / "narrow", lambda stored: stored.update(changed_by))
    written, _ = outputs(narrow, tiny_text, tmp_path / "written")
    torch.testing.assert_close(live, written, atol=1e-4, rtol=1e-4)
    whole, _ = outputs(source, tiny_text, tmp_path / "whole")
    assert (whole - live).square().mean() > 1e-4 * whole.square().mean()


def test_a_bias_takes_the_mean_of_what_goes_and_repair_leaves_outputs_closer(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("Starcoder2ForCausalLM")
    errors = []
    for repair in (True, False):
        target = tmp_path / str(repair)
        outcome = prune(STEP.model_copy(update={"repair": repair}), source, target, tiny_text)
        errors.append(float(outcome.metrics["relative_output_error"] or 0))
        name = "model.layers.0.self_attn.o_proj.bias"
        assert torch.equal(tensors_of(target)[name], tensors_of(source)[name]) != repair
    assert errors[0] < 0.8 * errors[1]


def test_the_configuration_says_how_many_are_left_and_how_large(tiny_text: Path, tmp_path: Path) -> None:
    # As SmolLM2: nine heads in threes, of a size that hidden width and number do not give afterwards.
    source = tiny_model(
        "LlamaForCausalLM", tmp_path / "source", hidden_size=144, num_attention_heads=9, num_key_value_heads=3,
        head_dim=16, dtype=torch.bfloat16,
    )  # fmt: skip
    outcome = prune(STEP.model_copy(update={"drop_ratio": 0.3}), source, tmp_path / "out", tiny_text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 2, 16)
    assert (outcome.metrics["heads_before"], outcome.metrics["heads_after"]) == (9, 6)
    attention = load_model(tmp_path / "out").model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (96, 144)
    assert attention.k_proj.weight.shape == (32, 144)
    assert attention.num_key_value_groups == 3
    assert {fact.dtype for fact in facts_of(tmp_path / "out").tensors} == {"BF16"}


def test_a_group_that_carries_nothing_goes_and_nothing_is_lost(tiny_text: Path, tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source")

    def silence(tensors: dict[str, Tensor]) -> None:
        for block in range(BLOCKS):
            tensors[f"model.layers.{block}.self_attn.v_proj.weight"][:HEAD_DIM] = 0

    given = changed(source, tmp_path / "silent", silence)
    outcome = prune(STEP, given, tmp_path / "out", tiny_text)
    assert outcome.metrics["relative_output_error"] == pytest.approx(0, abs=1e-5)
    tokens = load_tokenizer(given)("The old mill is under the bridge.", return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(
            load_model(tmp_path / "out")(**tokens)[0], load_model(given)(**tokens)[0], atol=1e-4, rtol=1e-4
        )


def test_stopped_in_the_middle_it_ends_with_the_same_bytes(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source, journal = tiny("LlamaForCausalLM"), tmp_path / "journal"

    def stop(_share: float, _message: str) -> None:
        if (journal / "block-00001").exists():
            raise Stopped

    with pytest.raises(Stopped):
        prune(STEP, source, tmp_path / "stopped", tiny_text, journal=journal, progress=stop)
    prune(STEP, source, tmp_path / "resumed", tiny_text, journal=journal)
    prune(STEP, source, tmp_path / "whole", tiny_text)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_what_a_configuration_cannot_say_is_refused(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    for architecture in ("BertModel", "GPT2LMHeadModel", "Olmo2ForCausalLM"):
        with pytest.raises(UnsupportedForModel, match="heads"):
            prune(STEP, tiny(architecture), tmp_path / architecture, tiny_text)
    one = tiny_model("LlamaForCausalLM", tmp_path / "one", num_key_value_heads=1)
    with pytest.raises(InvalidRequest, match="can be written"):
        prune(STEP, one, tmp_path / "out", tiny_text)


GROUPS, SIZE, TOKENS = 6, 4, 300


def layer(seed: int) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs), and H of inputs that depend on each other; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(TOKENS, 8) @ normal(8, GROUPS * SIZE) * normal(GROUPS * SIZE).exp()
    inputs += 0.3 * normal(TOKENS, GROUPS * SIZE)
    return normal(10, GROUPS * SIZE), inputs.t() @ inputs / TOKENS


def loss(weight: Tensor, moment: Tensor, groups: tuple[int, ...], *, repair: bool) -> float:
    kept = inputs_of_groups(torch.tensor(groups), SIZE)
    change = -weight
    change[:, kept] += refitted(weight, moment, kept) if repair else weight[:, kept]
    return float(((change @ moment) * change).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_group_that_goes_is_the_one_whose_loss_is_least(seed: int) -> None:
    weight, moment = layer(seed)
    left = tuple(range(GROUPS))
    for count in range(GROUPS - 1, 1, -1):
        left = min(combinations(left, count), key=lambda kept: loss(weight, moment, kept, repair=True))
        found = groups_hardest_to_replace(weight.clone(), torch.linalg.inv(moment), SIZE, count)
        assert tuple(found.tolist()) == left
    alone = [
        loss(weight, moment, tuple(g for g in range(GROUPS) if g != out), repair=False)
        for out in range(GROUPS)
    ]
    strongest = sorted(range(GROUPS), key=lambda out: -alone[out])[:2]
    assert strongest_groups(weight, moment, SIZE, 2).tolist() == sorted(strongest)
