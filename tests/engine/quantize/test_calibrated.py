"""quantize.calibrated on tiny models, through the loaders its users have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import changed, facts_of
from torch import Tensor, nn

from app.errors import InvalidRequest
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.architectures.skeleton import BlockCall
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import gather_moments, input_sites
from workers.engine.calibration.windows import model_windows
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]


def run(source: Path, target: Path, text: Path, step: QuantizeCalibrated | QuantizeWeights) -> StepOutcome:
    return run_step(
        step,
        StepContext(
            source=source, target=target, original=source, facts=facts_of(source), calibration_text=text
        ),
    )


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "BertModel", "MPNetModel"])
def test_outputs_stay_closer_than_by_rounding_to_nearest(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny(architecture)
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=512, length=64)
    with torch.inference_mode():
        expected = load_model(source)(windows)[0]
        errors = []
        for number, step in enumerate(
            (
                QuantizeCalibrated(bits=3, group_size=16, calibration_tokens=2048),
                QuantizeWeights(bits=3, group_size=16),
            )
        ):
            target = tmp_path / str(number)
            target.mkdir()
            run(source, target, tiny_text, step)
            errors.append(float((load_model(target)(windows)[0] - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1]


def test_next_block_is_calibrated_on_what_the_quantized_one_gives(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("LlamaForCausalLM")
    first = run(source, tmp_path / "a", tiny_text, QuantizeCalibrated(bits=2, calibration_tokens=256))
    only_first = QuantizeCalibrated(bits=2, calibration_tokens=256, ignore=("*.layers.0.*",))
    second = run(source, tmp_path / "b", tiny_text, only_first)
    errors = [
        {layer.name: layer.relative_error for layer in outcome.layers if ".layers.1." in layer.name}
        for outcome in (first, second)
    ]
    assert errors[0].keys() == errors[1].keys()
    assert errors[0] != errors[1]


def test_report_says_how_much_the_outputs_lost(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    lost = {}
    for bits in (8, 4, 2):
        step = QuantizeCalibrated(bits=bits, calibration_tokens=512)  # type: ignore[arg-type]
        lost[bits] = run(tiny("LlamaForCausalLM"), tmp_path / str(bits), tiny_text, step).metrics
    shares = [float(lost[bits]["relative_output_error"] or 0) for bits in (8, 4, 2)]
    assert 0 < shares[0] < 0.02 < shares[1] < shares[2] < 1


def test_text_too_short_for_a_window_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidRequest):
        run(tiny("LlamaForCausalLM"), tmp_path / "out", text, QuantizeCalibrated())
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_are_nan_are_named(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = changed(
        tiny("LlamaForCausalLM"), tmp_path / "broken", lambda tensors: tensors[name][0, 0].fill_(torch.nan)
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidRequest, match=name):
        run(source, tmp_path / "out", tiny_text, QuantizeCalibrated(calibration_tokens=256))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_layers_that_share_an_input_share_its_moments() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.after = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden: Tensor = self.after(self.left(inputs) + self.right(inputs))
            return hidden

    module, given = Block(), torch.randn(3, 2, 5, 4)
    seen: list[Tensor] = []
    block = LiveBlock(
        0,
        module,
        {},
        BlockCall((), {}),
        lambda: iter(given),
        len(given),
        given.__getitem__,
        Path(),
        lambda: None,
    )
    with torch.inference_mode():
        sites = input_sites(block, ("left", "right", "after"))
        handle = module.after.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].reshape(-1, 4))
        )
        gather_moments(block, sites)
        handle.remove()
        moments = [site.second_moment() for site in sites]
    assert [site.layers for site in sites] == [["left", "right"], ["after"]]
    rows, later = given.reshape(-1, 4), torch.cat(seen)
    torch.testing.assert_close(moments[0], rows.t() @ rows / len(rows))
    torch.testing.assert_close(moments[1], later.t() @ later / len(later))
    assert not module.left._forward_pre_hooks


@pytest.mark.parametrize("bits", [3, 2])
def test_trained_codes_leave_less_of_the_blocks_errors(
    bits: int, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    step = QuantizeCalibrated(
        bits=bits,  # type: ignore[arg-type]
        group_size=16,
        calibration_tokens=1024,
        solver="signround",
        tuning_steps=20,
    )
    outcome = run(tiny("LlamaForCausalLM"), tmp_path / "out", tiny_text, step)
    assert 0 < float(outcome.metrics["error_left_by_tuning"] or 0) < 0.95


def test_files_hold_the_codes_that_were_trained(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    names = {}
    for solver in ("gptq", "signround"):
        step = QuantizeCalibrated(bits=3, calibration_tokens=512, solver=solver, tuning_steps=10)  # type: ignore[arg-type]
        run(tiny("LlamaForCausalLM"), tmp_path / solver, tiny_text, step)
        names[solver] = load_file(tmp_path / solver / "model.safetensors")
    changed = [n for n, tensor in names["gptq"].items() if not torch.equal(tensor, names["signround"][n])]
    assert changed
    assert all(name.endswith(("packed", "scale")) for name in changed)
    # The scales of the first block come from the same statistics, and training leaves them alone.
    assert "model.layers.0.self_attn.q_proj.weight_packed" in changed
    assert "model.layers.0.self_attn.q_proj.weight_scale" not in changed


@pytest.mark.parametrize("scaling", ["awq", "smoothquant"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_factors_are_written_where_they_were_folded(
    architecture: str, scaling: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny(architecture)
    step = QuantizeCalibrated(bits=8, scaling=scaling, calibration_tokens=512)  # type: ignore[arg-type]
    run(source, tmp_path / "out", tiny_text, step)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(before[norm], after[norm])
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=256, length=64)
    with torch.inference_mode():
        expected, given = (load_model(path)(windows)[0] for path in (source, tmp_path / "out"))
    assert float((given - expected).norm() / expected.norm()) < 0.05


def test_corrected_biases_keep_the_mean_of_the_outputs(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = tiny("BertModel")
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=2048, length=64)
    queries = [_mean_query(source, windows)]
    for corrected in (False, True):
        target = tmp_path / str(corrected)
        step = QuantizeCalibrated(
            bits=2,
            solver="nearest",
            calibration_tokens=2048,
            sequence_length=64,
            bias_correction=corrected,
        )
        run(source, target, tiny_text, step)
        queries.append(_mean_query(target, windows))
    expected, plain, corrected_mean = queries
    assert (corrected_mean - expected).abs().mean() < 0.05 * (plain - expected).abs().mean()


def _mean_query(directory: Path, windows: Tensor) -> Tensor:
    """What the first block's query projection gives on average over tokens: (features,)."""
    model = load_model(directory)
    means: list[Tensor] = []
    query = model.get_submodule("encoder.layer.0.attention.self.query")
    query.register_forward_hook(lambda _, __, output: means.append(output.mean((0, 1))))
    with torch.inference_mode():
        model(windows)
    return means[0]
