"""prune.calibrated on tiny models: against the papers' formulas, and against what it should beat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from technique_runs import digests
from tiny_models import changed, facts_of

from app.errors import InvalidRequest
from app.spec.prune import PruneCalibrated
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.windows import model_windows
from workers.engine.prune.criteria import CRITERIA
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
TOKENS = 2048


def run(source: Path, target: Path, text: Path, budget: int | None = None, **settings: object) -> StepOutcome:
    target.mkdir()
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text,
        memory_budget=budget,
    )  # fmt: skip
    step = PruneCalibrated(calibration_tokens=TOKENS, **settings)  # type: ignore[arg-type]
    return run_step(step, context)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel", "GPT2LMHeadModel"])
def test_the_model_keeps_more_the_more_a_method_looks_at(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny(architecture)
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=1024, length=64)
    errors = []
    for number, settings in enumerate(
        (
            {"refinements": 20},
            {"criterion": "wanda", "compensate": False},
            {"criterion": "random", "compensate": False},
        )
    ):
        run(source, tmp_path / str(number), tiny_text, **settings)
        with torch.inference_mode():
            expected, given = (load_model(path)(windows)[0] for path in (source, tmp_path / str(number)))
        errors.append(float((given - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1] < 0.7 * errors[2]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_every_criterion_beats_chance(architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = tiny(architecture)
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=1024, length=64)
    lost = {}
    for criterion in CRITERIA:
        run(source, tmp_path / criterion, tiny_text, criterion=criterion, compensate=False)
        with torch.inference_mode():
            expected, given = (load_model(path)(windows)[0] for path in (source, tmp_path / criterion))
        lost[criterion] = float((given - expected).square().mean())
    chance = lost.pop("random")
    assert all(error < 0.9 * chance for error in lost.values()), (lost, chance)


def test_what_the_loss_does_not_depend_on_is_chosen_by_its_inputs(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    # Nothing of this layer's outputs is read.
    source = changed(
        tiny("LlamaForCausalLM"),
        tmp_path / "source",
        lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].zero_(),
    )
    outcome = run(source, tmp_path / "out", tiny_text, criterion="taylor")
    chosen = {
        warning.rpartition(" ")[2] for warning in outcome.warnings if warning.startswith("chosen by wanda")
    }
    assert chosen == {f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up")}
    assert all(
        layer.sparsity == pytest.approx(0.5, abs=1e-3) for layer in outcome.layers if layer.name in chosen
    )


def test_wanda_without_compensation_is_its_paper(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    run(source, tmp_path / "out", tiny_text, criterion="wanda", compensate=False)
    seen: list[torch.Tensor] = []
    model = load_model(source)
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    windows = model_windows(load_tokenizer(source), tiny_text, facts_of(source), tokens=TOKENS, length=512)
    with torch.inference_mode():
        model(windows)
    weight = load_file(source / "model.safetensors")[f"{name}.weight"].float()
    scores = weight.abs() * torch.cat(seen).norm(dim=0)
    gone = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"] == 0
    highest = scores.masked_fill(~gone, 0).amax(1)
    assert gone.sum(1).tolist() == [weight.shape[1] // 2] * len(weight)
    assert (highest < 1.0001 * scores.masked_fill(gone, torch.inf).amin(1)).all()


def test_a_small_budget_prunes_input_by_input_and_as_many(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("LlamaForCausalLM")
    wide, narrow = (
        run(source, tmp_path / str(budget), tiny_text, budget, pattern="2:4") for budget in (None, 2**20)
    )
    assert wide.metrics["sparsity"] == narrow.metrics["sparsity"] == 0.5
    # Later layers see what those pruned before them give.
    assert digests(tmp_path / "None") != digests(tmp_path / str(2**20))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("compensate", [True, False])
def test_report_says_what_outputs_and_weights_lost(
    compensate: bool, architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny(architecture)
    few, many = (
        run(source, tmp_path / str(share), tiny_text, sparsity=share, compensate=compensate)
        for share in (0.2, 0.7)
    )
    lost = [float(outcome.metrics["relative_output_error"] or 0) for outcome in (few, many)]
    assert 0 < lost[0] < 0.5 * lost[1] < 0.6
    assert few.metrics["sparsity"] == pytest.approx(0.2, abs=5e-3)
    for layer in many.layers:
        assert layer.sparsity == pytest.approx(0.7, abs=5e-3)
        assert 0 < (layer.relative_error or 0) < 1.5


def test_ignored_layers_stay_as_they_are(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    outcome = run(source, tmp_path / "out", tiny_text, ignore=("*.0.*", "*down_proj"))
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    pruned = {layer.name for layer in outcome.layers if layer.action == "pruned"}
    assert {name for name in before if not torch.equal(before[name], after[name])} == pruned
    assert pruned
    assert not [name for name in pruned if ".0." in name or "down_proj" in name]


def test_weights_that_are_nan_are_named(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = changed(
        tiny("LlamaForCausalLM"), tmp_path / "broken", lambda tensors: tensors[name][0, 0].fill_(torch.nan)
    )
    with pytest.raises(InvalidRequest, match=name):
        run(source, tmp_path / "out", tiny_text)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_stays_is_fitted_without_compensation_too(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    settings = {"criterion": "wanda", "compensate": False}
    plain, fitted = (
        run(source, tmp_path / str(steps), tiny_text, refinements=steps, **settings) for steps in (0, 20)
    )
    lost = [float(outcome.metrics["relative_output_error"] or 0) for outcome in (plain, fitted)]
    assert 0 < lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_the_dtype_they_are_stored_in(
    dtype: torch.dtype, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    source = changed(tiny("LlamaForCausalLM"), tmp_path / "source", convert)
    outcome = run(source, tmp_path / "out", tiny_text)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert all(layer.sparsity == pytest.approx(0.5, abs=1e-3) for layer in outcome.layers)


def test_inputs_that_are_always_zero_cost_nothing(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[::2] = 0

    source = changed(tiny("LlamaForCausalLM"), tmp_path / "source", silence)
    ignored = {"ignore": ("*o_proj", "*down_proj")}
    outcome = run(source, tmp_path / "out", tiny_text, criterion="wanda", compensate=False, **ignored)
    assert outcome.metrics["sparsity"] == 0.5
    assert float(outcome.metrics["relative_output_error"] or 0) == pytest.approx(0, abs=1e-6)
