"""Streamed gradients against those of the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import ALIKE, tensors_of
from tiny_models import BLOCKS, changed, facts_of, tiny_model
from torch import Tensor

from app.errors import JobFailed
from app.spec.architectures import ARCHITECTURES, is_compressible
from app.spec.base import Family
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration import model_tail
from workers.engine.calibration.block_stream import Calibration, LiveBlock
from workers.engine.calibration.weight_gradients import WeightGradients, gather_gradients
from workers.engine.calibration.windows import model_windows

Tiny = Callable[[str], Path]
SEED = 3
# One class of each family of weights, and the heads that encoders come with.
DECODERS = [a.name for a in ARCHITECTURES.values() if a.family is Family.CAUSAL_LM]
ENCODERS = [n for n in ARCHITECTURES if n.endswith(("Model", "SequenceClassification"))] + ["BertForMaskedLM"]


class Stopped(Exception):  # noqa: N818 - what a cancelled job raises is no error
    """Raised by progress to stop."""


def calibration(directory: Path, text: Path, spool: Path, **extra: Any) -> Calibration:
    windows = model_windows(load_tokenizer(directory), text, facts_of(directory), tokens=120, length=40)
    spool.mkdir(exist_ok=True)
    return Calibration(
        directory=directory, windows=windows, spool_directory=spool, device="cpu",
        **{"progress": lambda *_: None} | extra,
    )  # fmt: skip


def weights_of(directory: Path) -> set[str]:
    return {name for name, tensor in tensors_of(directory).items() if is_compressible(name, tensor.shape)}


def streamed(found: WeightGradients) -> dict[str, Tensor]:
    blocks = [found.of_block(index) for index in range(BLOCKS)]
    return {name: block.read(name).float() for block in blocks for name in block.tensors}


def whole(directory: Path, windows: Tensor) -> dict[str, Tensor]:
    """The mean of |∂L/∂w| by one backward pass a window, by the names the model has for its weights."""
    model = load_model(directory)
    sums: dict[str, Tensor] = {}
    for number, window in enumerate(windows[:, None]):
        model.zero_grad()
        if ARCHITECTURES[type(model).__name__].family is Family.CAUSAL_LM:
            loss = model(window, labels=window).loss * (window.shape[1] - 1)
        else:
            output = model(window)[0]
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(SEED + number))
            loss = (noise * output).sum()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, torch.zeros(())) + parameter.grad.abs() / len(windows)
    return sums


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in (*DECODERS, *ENCODERS)],
)
def test_they_are_those_of_the_whole_model(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several parts of the logits.
    monkeypatch.setattr(model_tail, "LOGITS_AT_ONCE", 320 * 16)
    directory = tiny(architecture)
    given = calibration(directory, tiny_text, tmp_path / "spool")
    ours = streamed(gather_gradients(given, weights_of(directory), seed=SEED))
    expected = whole(directory, given.windows)
    assert ours.keys() == weights_of(directory)
    compared = 0
    for name, mean in ours.items():
        # transformers joins experts, and drops a prefix where it loads a bare encoder.
        theirs = next((g for n, g in expected.items() if name == n or name.endswith(f".{n}")), None)
        if theirs is not None:
            torch.testing.assert_close(mean, theirs, rtol=1e-2, atol=1e-2 * float(theirs.mean()))
            compared += 1
    assert compared >= 2 * BLOCKS


@pytest.mark.parametrize("block", range(BLOCKS))
def test_stopped_at_any_block_it_ends_with_the_same(
    block: int, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    directory, spool = tiny("LlamaForCausalLM"), tmp_path / "spool"

    def stop(_share: float, message: str) -> None:
        if message == f"backward, block {block + 1} of {BLOCKS}":
            raise Stopped

    wanted = weights_of(directory)
    with pytest.raises(Stopped):
        gather_gradients(calibration(directory, tiny_text, spool, progress=stop), wanted, seed=SEED)
    said: list[str] = []
    resumed = gather_gradients(
        calibration(directory, tiny_text, spool, progress=lambda _, message: said.append(message)),
        wanted,
        seed=SEED,
    )
    assert said[0].startswith("backward, block" if block < BLOCKS - 1 else "backward, the loss")
    again = gather_gradients(calibration(directory, tiny_text, tmp_path / "again"), wanted, seed=SEED)
    for index in range(BLOCKS):
        assert resumed.file(index).read_bytes() == again.file(index).read_bytes()
    # What is large is not left behind.
    assert not [path for path in spool.iterdir() if path.name.startswith(("inputs", "slopes"))]


def test_squares_at_the_outputs_are_means_over_tokens(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    directory = tiny("LlamaForCausalLM")
    given = calibration(directory, tiny_text, tmp_path / "spool")
    seen: dict[str, Tensor] = {}

    def probe(block: LiveBlock, squares: dict[str, Tensor]) -> dict[str, Any]:
        seen.update(squares)
        return {"block": block.index, "tokens": sum(len(hidden.flatten(0, 1)) for hidden in block.inputs())}

    found = gather_gradients(given, weights_of(directory), seed=SEED, probe=probe).probed()
    assert found == [{"block": index, "tokens": given.windows.numel()} for index in range(BLOCKS)]
    model = load_model(directory)
    name = "model.layers.1.self_attn.v_proj"
    slopes: list[Tensor] = []
    model.get_submodule(name).register_full_backward_hook(lambda _, _inputs, out: slopes.append(out[0][0]))
    for window in given.windows[:, None]:
        (model(window, labels=window).loss * (window.shape[1] - 1)).backward()
    expected = torch.cat(slopes).square().mean(0)
    torch.testing.assert_close(seen[f"{name}.weight"], expected, rtol=1e-3, atol=1e-6)


def test_progress_grows_and_all_of_it_is_said(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    directory = tiny("LlamaForCausalLM")
    shares: list[float] = []
    given = calibration(
        directory, tiny_text, tmp_path / "spool", progress=lambda share, _: shares.append(share)
    )
    gather_gradients(given, weights_of(directory), seed=SEED)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_in_bfloat16_they_are_nearly_those_of_float32(tiny_text: Path, tmp_path: Path) -> None:
    directory = tiny_model("LlamaForCausalLM", tmp_path / "model", dtype=torch.bfloat16)
    found = [
        streamed(
            gather_gradients(
                calibration(directory, tiny_text, tmp_path / str(dtype), dtype=dtype), weights_of(directory), seed=SEED
            )
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip
    for name, exact in found[0].items():
        assert (found[1][name] - exact).norm() < 0.1 * exact.norm()


def test_a_model_that_gives_nan_is_refused(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = changed(
        tiny("LlamaForCausalLM"), tmp_path / "broken", lambda tensors: tensors[name][0, 0].fill_(torch.nan)
    )
    with pytest.raises(JobFailed, match="gradient"):
        gather_gradients(
            calibration(directory, tiny_text, tmp_path / "spool"), weights_of(directory), seed=SEED
        )
