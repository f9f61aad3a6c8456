from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import digests, tensors_of
from tiny_models import BLOCKS, HEAD_DIM, HIDDEN, changed, facts_of, tiny_model
from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.prune_hidden import PruneHidden, hidden_axis
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.prune import hidden
from workers.engine.prune.hidden_directions import turned_to_gains
from workers.engine.technique import StepContext, StepOutcome, run_step

STEP = PruneHidden(calibration_tokens=512)
WIDTH = HIDDEN * 3 // 4
# Separate and shared keys and heads, biases, fused projections, factors, a norm that adds one, experts and shared ones.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "biased": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 3.0}),
    "mixtral": ("MixtralForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
}  # fmt: skip


class Stopped(Exception):  # noqa: N818 - what a cancelled job raises is no error
    """Raised by progress to stop."""


def prune(step: PruneHidden, source: Path, target: Path, text: Path, **extra: Any) -> StepOutcome:
    target.mkdir(parents=True, exist_ok=True)
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text, **extra
    )
    return run_step(step, context)


def with_states_scaled(source: Path, target: Path, scales: Tensor) -> Path:
    """A model whose states have these sizes (hidden,) along directions that are no channels."""
    generator = torch.Generator().manual_seed(7)
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q
    scaling = rotation * scales @ rotation.T

    def scale(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "embed_tokens" in name:
                tensors[name] = tensor @ scaling
            elif hidden_axis(name) == 0 and "norm" not in name:
                tensors[name] = scaling @ tensor

    return changed(source, target, scale)


def logits(directory: Path) -> Tensor:
    tokens = load_tokenizer(directory)(
        "The clock runs past the old mill, and nobody fish in summer.", return_tensors="pt"
    )
    with torch.inference_mode():
        return load_model(directory)(**tokens).logits


def divergence(result: Path, original: Path) -> float:
    now, before = (logits(directory).log_softmax(-1) for directory in (result, original))
    return float((before.exp() * (before - now)).sum(-1).mean())


# Cut as they are all must fit; refitted, there is nothing to be gained and nothing to be lost.
@pytest.mark.parametrize(
    ("kind", "repair"),
    [*((kind, False) for kind in KINDS), ("tied", True), ("biased", True), ("mixtral", True)],
)
def test_directions_that_states_never_have_are_not_missed(
    kind: str, repair: bool, tiny_text: Path, tmp_path: Path
) -> None:
    architecture, config = KINDS[kind]
    whole = tiny_model(architecture, tmp_path / "whole", **config)
    source = with_states_scaled(whole, tmp_path / "source", (torch.arange(HIDDEN) < WIDTH - 8).float())
    outcome = prune(STEP.model_copy(update={"repair": repair}), source, tmp_path / "out", tiny_text)
    assert outcome.metrics["relative_output_error"] < 1e-3
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), atol=2e-3, rtol=2e-3)
    assert logits(source).std() > 0.1


def test_strong_directions_beat_strong_channels_and_refitting_helps_both(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_model("LlamaForCausalLM", tmp_path / "whole")
    source = with_states_scaled(whole, tmp_path / "source", 0.96 ** torch.arange(HIDDEN))
    found: dict[tuple[str, bool], float] = {}
    for kind in ("directions", "channels"):
        for repair in (True, False):
            step = STEP.model_copy(update={"repair": repair, "calibration_tokens": 2048})
            prune(step, source, tmp_path / f"{kind}-{repair}", tiny_text)
            found[kind, repair] = divergence(tmp_path / f"{kind}-{repair}", source)
        monkeypatch.setattr(hidden, "strongest_directions", strongest_channels)
    assert found["directions", True] < 0.9 * found["directions", False]
    assert found["channels", True] < 0.9 * found["channels", False]
    assert found["directions", True] < 0.5 * found["channels", True]


def strongest_channels(moment: Tensor, width: int) -> Tensor:
    return torch.eye(len(moment))[:, moment.diagonal().topk(width).indices]


def test_a_basis_is_turned_within_its_span() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 10, generator=generator)).Q
    gains = 1 + torch.randn(24, generator=generator)
    turned = turned_to_gains(basis, gains)
    torch.testing.assert_close(turned @ turned.T, basis @ basis.T, atol=1e-5, rtol=0)
    between = turned.T @ (gains[:, None] * turned)
    torch.testing.assert_close(between, between.diagonal().diag(), atol=1e-5, rtol=0)


def test_a_tied_head_stays_tied_and_weights_keep_their_dtype(tiny_text: Path, tmp_path: Path) -> None:
    source = tiny_model(
        "Qwen2ForCausalLM", tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=True
    )
    prune(STEP, source, tmp_path / "out", tiny_text)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert set(after) == set(before)
    assert "lm_head.weight" not in after
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    config, now = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    assert now == config | {"hidden_size": WIDTH, "head_dim": HEAD_DIM}


@pytest.mark.parametrize(
    ("written", "begins"),
    [
        # The directions are known, and nothing is narrowed; a block is narrowed and not passed; all are.
        ("directions", "block 1 of"),
        ("block-00000", "block 1 of"),
        (f"block-{BLOCKS - 1:05d}", f"block {BLOCKS} of"),
        (f"block-{BLOCKS - 1:05d}.json", "writing"),
    ],
)
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    written: str, begins: str, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    source, journal = tiny("LlamaForCausalLM"), tmp_path / "journal"
    said: list[str] = []

    def stop(_share: float, _message: str) -> None:
        if (journal / written).exists():
            raise Stopped

    with pytest.raises(Stopped):
        prune(STEP, source, tmp_path / "stopped", tiny_text, journal=journal, progress=stop)
    prune(
        STEP, source, tmp_path / "resumed", tiny_text, journal=journal,
        progress=lambda _, message: said.append(message),
    )  # fmt: skip
    assert said[0].startswith(begins)
    assert not journal.exists()
    prune(STEP, source, tmp_path / "whole", tiny_text)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("architecture", "step", "error"),
    [
        ("GPT2LMHeadModel", STEP, UnsupportedForModel),
        ("Gemma3ForCausalLM", STEP, UnsupportedForModel),
        ("LlamaForCausalLM", PruneHidden(round_to=HIDDEN), InvalidRequest),
        ("LlamaForCausalLM", PruneHidden(hidden_size=50), InvalidRequest),
    ],
)
def test_what_could_not_be_narrowed_is_refused(
    architecture: str, step: PruneHidden, error: type[Exception], tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(error, match=r"cannot be turned|nothing smaller is left"):
        prune(step, tiny(architecture), tmp_path / "out", tiny_text)
