from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import ALIKE
from tiny_models import BLOCKS, facts_of, tiny_model
from torch import Tensor, nn

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family
from app.spec.prune import PruneDepth
from workers.engine.architectures.block_removal import remove_blocks
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.block_influence import block_influence
from workers.engine.calibration.block_stream import Calibration, stream_blocks
from workers.engine.calibration.windows import model_windows
from workers.engine.prune.depth import least_influential, prune_depth
from workers.engine.technique import StepContext

# Behaviour that depends on a block's place: (architecture, what to set in its config).
PLACED: dict[str, tuple[str, dict[str, Any]]] = {
    "alternating windows": ("Gemma2ForCausalLM", {"sliding_window": 8}),
    "windows but for every second": ("Gemma3ForCausalLM", {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    }),
    "windows from the third on": ("Qwen2ForCausalLM", {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
    }),
    "no rotary embedding in every second": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "experts in every second": ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}),
    "no experts in the second": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [1]}),
}  # fmt: skip


# One class of each family of weights' names, and every kind of prefix that heads put before them.
STREAMED = [n for n in ARCHITECTURES if n.endswith(("CausalLM", "Model"))] + ["BertForMaskedLM"]
REMOVED = [n for n in ARCHITECTURES if n.endswith(("CausalLM", "SequenceClassification"))] + [
    "MPNetForMaskedLM", "GPT2LMHeadModel",
]  # fmt: skip


def _fast(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in names]


def _ignore(fraction: float, message: str) -> None:
    assert 0 <= fraction <= 1, message


def _windows(directory: Path, text: Path, *, length: int = 48) -> Tensor:
    return model_windows(load_tokenizer(directory), text, facts_of(directory), tokens=192, length=length)


def _context(source: Path, target: Path, text: Path, **extra: Any) -> StepContext:
    target.mkdir(parents=True, exist_ok=True)
    return StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text, **extra
    )


def _blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))


@torch.inference_mode()
def _skipping(directory: Path, dropped: list[int], windows: Tensor) -> Tensor:
    """Output of the original with some blocks handing their input on unchanged."""
    model = load_model(directory)
    for index in dropped:
        others = {"MPN": (), "Deb": (None,)}.get(type(model).__name__[:3])

        def hand_on(hidden: Tensor, *args: Any, others: Any = others, **kwargs: Any) -> Any:
            return hidden if others is None else (hidden, *others)

        _blocks(model)[index].forward = hand_on
    return model(windows, **_no_cache(model))[0]


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if ARCHITECTURES[type(model).__name__].family is Family.CAUSAL_LM else {}


def _calibration(directory: Path, windows: Tensor, spool: Path) -> Calibration:
    return Calibration(
        directory=directory, windows=windows, spool_directory=spool, device="cpu", progress=_ignore
    )


@pytest.mark.parametrize("architecture", _fast(STREAMED))
@torch.inference_mode()
def test_streamed_hidden_states_are_those_of_the_whole_model(
    architecture: str, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    directory = tiny(architecture)
    windows = _windows(directory, tiny_text)
    streamed: dict[int, list[Tensor]] = {}
    stream_blocks(
        _calibration(directory, windows, tmp_path),
        lambda index, before, after: streamed.setdefault(index, []).append(torch.stack((before, after))),
    )
    model = load_model(directory)
    whole: list[Tensor] = []
    for block in _blocks(model):
        block.register_forward_hook(
            lambda m, args, kwargs, out: whole.append(
                torch.stack((args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out))
            ),
            with_kwargs=True,
        )  # fmt: skip
    model(windows)
    assert len(whole) == len(streamed) == BLOCKS
    for index, both in enumerate(whole):
        ours = torch.cat(streamed[index], dim=1)
        torch.testing.assert_close(ours, both, atol=1e-4, rtol=1e-4)


def test_influence_is_one_minus_the_cosine_in_float64(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    directory = tiny("LlamaForCausalLM")
    windows = _windows(directory, tiny_text)
    influence = block_influence(_calibration(directory, windows, tmp_path))
    with torch.inference_mode():
        model = load_model(directory, dtype=torch.float64)
        hidden: list[Tensor] = []
        for block in _blocks(model):
            block.register_forward_hook(lambda m, args, out: hidden.append(torch.stack((args[0], out))))
        model(windows)
    expected = [
        float((1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean())
        for x, y in (pair.unbind() for pair in hidden)
    ]
    assert influence == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", _fast(REMOVED))
def test_the_smaller_model_is_the_original_with_blocks_skipped(
    architecture: str, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    directory = tiny(architecture)
    windows = _windows(directory, tiny_text)
    dropped = [1, 2] if ARCHITECTURES[architecture].keeps_first_block else [0, 2]
    remove_blocks(directory, tmp_path / "out", dropped, max_shard_bytes=10**9, progress=_ignore)
    smaller = load_model(tmp_path / "out")
    with torch.inference_mode():
        output = smaller(windows, **_no_cache(smaller))[0]
    torch.testing.assert_close(output, _skipping(directory, dropped, windows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", PLACED)
@pytest.mark.parametrize("dropped", [[0], [1, 2]])
def test_kept_blocks_behave_as_in_their_old_place(
    what: str, dropped: list[int], tiny_text: Path, tmp_path: Path
) -> None:
    architecture, config = PLACED[what]
    directory = tiny_model(architecture, tmp_path / "source", **config)
    windows = _windows(directory, tiny_text)
    _forget_lists(directory)
    expected = _skipping(directory, dropped, windows)
    remove_blocks(directory, tmp_path / "out", dropped, max_shard_bytes=10**9, progress=_ignore)
    smaller = load_model(tmp_path / "out")
    with torch.inference_mode():
        output = smaller(windows, use_cache=False)[0]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_a_first_block_that_is_built_differently_stays(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="first block"):
        remove_blocks(tiny("ModernBertModel"), tmp_path / "out", [0], max_shard_bytes=10**9, progress=_ignore)
    assert least_influential([0.0, 0.3, 0.2], 1, first=1) == [2]


def test_blocks_that_are_scaled_by_their_number_stay(tmp_path: Path) -> None:
    directory = tiny_model("GPT2LMHeadModel", tmp_path / "source", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedForModel, match="number of the block"):
        remove_blocks(directory, tmp_path / "out", [1], max_shard_bytes=10**9, progress=_ignore)


def _forget_lists(directory: Path) -> None:
    """Leave only the rule in config.json, as older releases of these models do, where the rule says it all."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    if config["model_type"] != "gemma3_text":
        config.pop("layer_types", None)
        config.pop("no_rope_layers", None)
    file.write_text(json.dumps(config))


def test_blocks_of_least_influence_go_and_every_layer_is_accounted_for(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    directory = tiny("LlamaForCausalLM")
    seen: list[float] = []
    context = _context(
        directory, tmp_path / "out", tiny_text, progress=lambda fraction, message: seen.append(fraction)
    )
    outcome = prune_depth(PruneDepth(drop_blocks=2, calibration_tokens=128), context)
    influence = [value for _, value in outcome.curves["block_influence"]]
    dropped = sorted(sorted(range(BLOCKS), key=lambda index: influence[index])[:2])
    assert outcome.metrics["blocks_removed"] == " ".join(map(str, dropped))
    assert {layer.name for layer in outcome.layers} == {
        fact.name for fact in facts_of(directory).compressible()
    }
    removed = {layer.name for layer in outcome.layers if layer.action == "removed"}
    assert removed == {
        f.name for f in facts_of(directory).compressible() if int(f.name.split(".")[2]) in dropped
    }
    assert facts_of(tmp_path / "out").num_blocks == BLOCKS - 2
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert list(tmp_path.glob("spool-*")) == []


def test_ties_go_to_the_earlier_block() -> None:
    assert least_influential([0.3, 0.1, 0.1, 0.1], 2) == [1, 2]


@pytest.mark.parametrize("count", [BLOCKS, BLOCKS + 7])
def test_removing_every_block_is_refused(
    count: int, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    context = _context(tiny("BertModel"), tmp_path / "out", tiny_text)
    with pytest.raises(InvalidRequest, match=f"{count} blocks"):
        prune_depth(PruneDepth(drop_blocks=count), context)


def test_writing_a_model_without_blocks_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="All 4 blocks"):
        remove_blocks(
            tiny("BertModel"), tmp_path / "out", range(BLOCKS), max_shard_bytes=10**9, progress=_ignore
        )


def test_weights_keep_their_dtype_and_shards_their_size(tmp_path: Path) -> None:
    directory = tiny_model("LlamaForCausalLM", tmp_path / "source", dtype=torch.bfloat16)
    remove_blocks(directory, tmp_path / "out", [1], max_shard_bytes=60_000, progress=_ignore)
    assert {fact.dtype for fact in facts_of(tmp_path / "out").tensors} == {"BF16"}
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_cancelling_leaves_no_spool_behind(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    def cancel(fraction: float, message: str) -> None:
        raise KeyboardInterrupt

    context = _context(tiny("BertModel"), tmp_path / "out", tiny_text, progress=cancel)
    with pytest.raises(KeyboardInterrupt):
        prune_depth(PruneDepth(drop_blocks=1, calibration_tokens=128), context)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
