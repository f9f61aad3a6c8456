"""prune.magnitude: exact thresholds against sorting, and what is written against what is promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, facts_of, tiny_model

from app.errors import InvalidRequest
from app.spec.prune import PruneMagnitude
from workers.engine.architectures.loading import load_model
from workers.engine.prune.threshold import spread
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def run(source: Path, target: Path, step: PruneMagnitude, **context: object) -> StepOutcome:
    given = StepContext(source=source, target=target, original=source, facts=facts_of(source), **context)  # type: ignore[arg-type]
    return run_step(step, given)


def pruned(source: Path, target: Path, step: PruneMagnitude) -> tuple[StepOutcome, Tensors, Tensors]:
    """The outcome, and the compressible weights before and after."""
    outcome = run(source, target, step)
    names = {fact.name for fact in facts_of(source).compressible()}
    files = (load_file(d / "model.safetensors") for d in (source, target))
    before, after = ({name: tensors[name] for name in names} for tensors in files)
    return outcome, before, after


def changed(source: Path, directory: Path, change: Callable[[torch.Tensor], object]) -> tuple[Path, str]:
    """A copy of a model in which one layer's weight was changed in place; the weight's name."""
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    change(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.001, 0.37, 0.5, 0.9, 0.999])
def test_each_layer_loses_exactly_its_smallest_weights(
    sparsity: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", dtype=dtype)
    _, before, after = pruned(source, tmp_path / "p", PruneMagnitude(sparsity=sparsity))
    for name, weight in before.items():
        size = weight.float().abs()
        zeros = after[name] == 0
        assert int(zeros.sum()) == max(round(sparsity * weight.numel()), int((weight == 0).sum()))
        assert not zeros.any() or size[zeros].max() <= size[~zeros].min()
        assert torch.equal(after[name][~zeros], weight[~zeros])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_scope_cuts_all_layers_at_one_threshold(dtype: torch.dtype, tmp_path: Path) -> None:
    source, name = changed(
        tiny_model("LlamaForCausalLM", tmp_path / "plain", dtype=dtype),
        tmp_path / "source",
        lambda w: w.mul_(4),
    )
    outcome, before, after = pruned(source, tmp_path / "p", PruneMagnitude(sparsity=0.6, scope="global"))
    total = sum(weight.numel() for weight in before.values())
    zeros = {n: weight == 0 for n, weight in after.items()}
    assert sum(int(z.sum()) for z in zeros.values()) == pytest.approx(0.6 * total, abs=len(after))
    cut = max(before[n].float().abs()[z].max() for n, z in zeros.items() if z.any())
    kept = min(before[n].float().abs()[~z].min() for n, z in zeros.items())
    assert cut <= kept
    sparsity = {layer.name: layer.sparsity or 0.0 for layer in outcome.layers}
    assert sparsity[name] < 0.5 * min(s for n, s in sparsity.items() if n != name)


def test_ties_are_shared_out_so_that_the_sparsity_is_exact(tiny: Tiny, tmp_path: Path) -> None:
    source, name = changed(
        tiny("LlamaForCausalLM"), tmp_path / "source", lambda w: w.copy_(torch.sign(w) * 0.25)
    )
    _, _, after = pruned(source, tmp_path / "p", PruneMagnitude(sparsity=0.3))
    zeros = after[name] == 0
    assert int(zeros.sum()) == round(0.3 * zeros.numel())
    # None of the rows pays for the others.
    assert (zeros.float().mean(1) - 0.3).abs().max() < 0.05


@pytest.mark.parametrize(("count", "share"), [(10, 0.0), (10, 1.0), (7, 0.5), (1000, 0.333), (0, 0.5)])
def test_spread_chooses_the_share_without_repeats(count: int, share: float) -> None:
    chosen = spread(count, share)
    assert len(chosen) == len(set(chosen.tolist())) == round(share * count)
    assert all(0 <= index < count for index in chosen.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_of_four_keeps_the_two_largest(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", dtype=dtype)
    outcome, before, after = pruned(source, tmp_path / "p", PruneMagnitude(pattern="2:4"))
    for name, weight in before.items():
        fours, kept = weight.float().abs().view(-1, 4), after[name].float().abs().view(-1, 4)
        assert ((kept != 0).sum(1) == 2).all()
        assert torch.equal(kept.sum(1), fours.topk(2).values.sum(1))
    assert {layer.sparsity for layer in outcome.layers} == {0.5}


def test_two_of_four_prunes_exactly_two_of_equals(tiny: Tiny, tmp_path: Path) -> None:
    source, name = changed(tiny("LlamaForCausalLM"), tmp_path / "source", lambda w: w.fill_(0.5))
    _, _, after = pruned(source, tmp_path / "p", PruneMagnitude(pattern="2:4"))
    assert torch.equal(after[name].view(-1, 4)[0], torch.tensor([0.5, 0.5, 0, 0]))
    assert ((after[name].view(-1, 4) != 0).sum(1) == 2).all()


def test_the_outcome_is_measured_on_what_was_written(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("BertModel")
    step = PruneMagnitude(sparsity=0.7, ignore=("*.0.*", "*nothing*"))
    outcome, before, after = pruned(source, tmp_path / "p", step)
    assert sorted(layer.name for layer in outcome.layers) == sorted(before)
    for layer in outcome.layers:
        error = (after[layer.name] - before[layer.name]).norm() / before[layer.name].norm()
        if layer.action == "untouched":
            assert torch.equal(after[layer.name], before[layer.name])
            assert ".0." in layer.name
            continue
        assert layer.sparsity == (after[layer.name] == 0).double().mean()
        assert layer.sparsity == pytest.approx(0.7, abs=1e-3)
        assert layer.relative_error == pytest.approx(error.item(), rel=1e-4)
    assert sum(layer.action == "untouched" for layer in outcome.layers) * BLOCKS == len(outcome.layers)
    assert outcome.metrics["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert outcome.warnings == ("ignore pattern '*nothing*' matches no layer",)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_other_tensors_and_files_are_copied_and_the_model_loads(
    scope: str, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny("Gemma3ForCausalLM")
    run(source, tmp_path / "p", PruneMagnitude(scope=scope))  # type: ignore[arg-type]
    chosen = {fact.name for fact in facts_of(source).compressible()}
    before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "p"))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - chosen)
    assert {f.name for f in source.iterdir()} == {f.name for f in (tmp_path / "p").iterdir()}
    logits = load_model(tmp_path / "p")(torch.arange(8).view(1, 8))[0]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("step", [PruneMagnitude(scope="global"), PruneMagnitude(pattern="2:4")], ids=str)
def test_same_bytes_whatever_the_number_of_threads(step: PruneMagnitude, tiny: Tiny, tmp_path: Path) -> None:
    outcomes = [run(tiny("Qwen3ForCausalLM"), tmp_path / str(n), step, threads=n) for n in (1, 4)]
    contents = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in (1, 4)]
    assert contents[0] == contents[1]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("step", [PruneMagnitude(), PruneMagnitude(pattern="2:4")], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    value: float, step: PruneMagnitude, tiny: Tiny, tmp_path: Path
) -> None:
    source, name = changed(tiny("LlamaForCausalLM"), tmp_path / "source", lambda w: w[5, 7].fill_(value))
    with pytest.raises(InvalidRequest, match=name) as caught:
        run(source, tmp_path / "p", step)
    assert caught.value.code == "non_finite_weights"


def test_progress_rises_to_one(tiny: Tiny, tmp_path: Path) -> None:
    seen: list[float] = []
    run(tiny("LlamaForCausalLM"), tmp_path / "p", PruneMagnitude(), progress=lambda f, _: seen.append(f))
    assert seen == sorted(seen)
    assert seen[-1] == 1
