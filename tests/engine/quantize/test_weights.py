"""quantize.weights on tiny models, read back by our own reader and by transformers with compressed-tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, HIDDEN, facts_of, tiny_model

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.quantize import QuantizeWeights
from workers.engine.architectures.loading import load_model
from workers.engine.export.compressed_tensors import read_dequantized, read_scheme
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]

ARCHITECTURES = (
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "DistilBertModel",
    "MPNetModel",
    "RobertaModel",
    "OPTForCausalLM",
    "GPT2LMHeadModel",
    "ModernBertModel",
)
SCHEMES = [
    QuantizeWeights(bits=bits, symmetric=symmetric, group_size=size)  # type: ignore[arg-type]
    for bits, symmetric, size in itertools.product((8, 4, 3, 2), (True, False), (None, 16))
]


def run(source: Path, target: Path, step: QuantizeWeights, **context: object) -> StepOutcome:
    given = StepContext(source=source, target=target, original=source, facts=facts_of(source), **context)  # type: ignore[arg-type]
    return run_step(step, given)


def outputs(directory: Path, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """What transformers computes from a directory, with some weights replaced after loading."""
    model = load_model(directory)
    for name, tensor in (weights or {}).items():
        parameter = parameter_of(model, name)
        if parameter is not None:
            parameter.data = tensor.to(parameter.dtype)
    with torch.inference_mode():
        result: torch.Tensor = model(torch.arange(10, 30).view(2, 10))[0]
    return result


def parameter_of(model: torch.nn.Module, name: str) -> torch.nn.Parameter | None:
    """A bare encoder does without the prefix, and without the head, that its checkpoint may have."""
    parameters = dict(model.named_parameters())
    return parameters.get(name, parameters.get(name.partition(".")[2]))


def assert_computes_with_dequantized_weights(source: Path, quantized: Path) -> None:
    scheme = read_scheme(quantized)
    assert scheme is not None
    weights = dict(read_dequantized(quantized))
    if not scheme.symmetric:
        # Asked to dequantize while loading, transformers rounds to the dtype of the scales.
        stored = load_dtype(quantized)
        weights = {name: weight.to(stored).float() for name, weight in weights.items()}
    expected = outputs(source, weights)
    torch.testing.assert_close(outputs(quantized), expected, rtol=1e-4, atol=1e-5)
    # Both would agree as well if nothing had been replaced.
    assert not torch.equal(expected, outputs(source))


def load_dtype(quantized: Path) -> torch.dtype:
    stored = load_file(quantized / "model.safetensors")
    return next(tensor.dtype for name, tensor in stored.items() if name.endswith("weight_scale"))


def name_of(step: QuantizeWeights) -> str:
    return f"int{step.bits}-{'sym' if step.symmetric else 'asym'}-{step.group_size or 'channel'}"


@pytest.mark.parametrize("step", SCHEMES, ids=name_of)
def test_transformers_computes_with_the_dequantized_weights(
    step: QuantizeWeights, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny("LlamaForCausalLM")
    run(source, tmp_path / "q", step)
    assert_computes_with_dequantized_weights(source, tmp_path / "q")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_load_as_well(
    architecture: str, symmetric: bool, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(architecture)
    run(source, tmp_path / "q", QuantizeWeights(bits=4, group_size=16, symmetric=symmetric))
    assert_computes_with_dequantized_weights(source, tmp_path / "q")


@pytest.mark.slow
@pytest.mark.parametrize("step", SCHEMES, ids=name_of)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_in_every_scheme(
    architecture: str, step: QuantizeWeights, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(architecture)
    run(source, tmp_path / "q", step)
    assert_computes_with_dequantized_weights(source, tmp_path / "q")


@pytest.mark.parametrize("step", SCHEMES, ids=name_of)
def test_relative_error_is_that_of_the_file(step: QuantizeWeights, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    outcome = run(source, tmp_path / "q", step)
    before, after = load_file(source / "model.safetensors"), dict(read_dequantized(tmp_path / "q"))
    for layer in outcome.layers:
        name = layer.name
        error = (after[name].double() - before[name].double()).norm() / before[name].double().norm()
        assert layer.relative_error == pytest.approx(error.item(), rel=1e-3)


def test_every_compressible_layer_is_named_once_with_its_real_bits(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    outcome = run(source, tmp_path / "q", QuantizeWeights(bits=4, group_size=16, symmetric=False))
    assert sorted(layer.name for layer in outcome.layers) == sorted(
        fact.name for fact in facts_of(source).compressible()
    )
    stored = load_file(tmp_path / "q/model.safetensors")
    for layer in outcome.layers:
        size = sum(t.nbytes for name, t in stored.items() if name.startswith(f"{layer.name}_"))
        assert layer.bits == 8 * size / layer.parameters
        assert layer.action == "quantized"


def test_all_other_tensors_are_copied_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("BertForSequenceClassification")
    outcome = run(source, tmp_path / "q", QuantizeWeights(bits=8))
    quantized = {layer.name for layer in outcome.layers}
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "q/model.safetensors")
    others = before.keys() - quantized
    assert "classifier.weight" in others
    for name in others:
        assert torch.equal(before[name], after[name])
    assert not quantized & after.keys()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_ignored_layers_stay_as_they_were_and_say_why(architecture: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(architecture)
    pattern = "*.0.*"
    outcome = run(source, tmp_path / "q", QuantizeWeights(bits=3, ignore=(pattern, "*nothing*")))
    left = [layer for layer in outcome.layers if layer.action == "untouched"]
    assert len(left) * BLOCKS == len(outcome.layers)
    assert all(".0." in layer.name and pattern in (layer.reason or "") for layer in left)
    assert outcome.warnings[0] == "ignore pattern '*nothing*' matches no layer"
    assert "vLLM runs packed integers of 4 and 8 bits only" in outcome.warnings[1]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "q/model.safetensors")
    assert all(torch.equal(before[x.name], after[x.name]) for x in left)
    assert_computes_with_dequantized_weights(source, tmp_path / "q")


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "tied", tie_word_embeddings=True)
    run(source, tmp_path / "q", QuantizeWeights(bits=4))
    assert "lm_head.weight" not in load_file(tmp_path / "q/model.safetensors")
    model = load_model(tmp_path / "q")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert_computes_with_dequantized_weights(source, tmp_path / "q")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_the_dtype_of_the_checkpoint(dtype: torch.dtype, symmetric: bool, tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "half", dtype=dtype)
    run(source, tmp_path / "q", QuantizeWeights(bits=4, group_size=16, symmetric=symmetric))
    stored = load_file(tmp_path / "q/model.safetensors")
    assert {t.dtype for name, t in stored.items() if name.endswith("weight_scale")} == {dtype}
    assert_computes_with_dequantized_weights(source, tmp_path / "q")


def test_same_bytes_whatever_the_number_of_threads(tiny: Tiny, tmp_path: Path) -> None:
    step = QuantizeWeights(bits=4, group_size=16, symmetric=False)
    outcomes = [run(tiny("Qwen3ForCausalLM"), tmp_path / str(n), step, threads=n) for n in (1, 4)]
    contents = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in (1, 4)]
    assert contents[0] == contents[1]
    assert outcomes[0] == outcomes[1]


def test_shards_hold_what_one_file_holds(tiny: Tiny, tmp_path: Path) -> None:
    step = QuantizeWeights(bits=4)
    source = tiny("LlamaForCausalLM")
    run(source, tmp_path / "one", step)
    run(source, tmp_path / "many", step, max_shard_bytes=50_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    joined = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(tmp_path / "one/model.safetensors")
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    torch.testing.assert_close(outputs(tmp_path / "many"), outputs(tmp_path / "one"))


@pytest.mark.parametrize("search", ["mse", "absmax"])
def test_a_row_of_zeros_stays_zeros(search: str, tiny: Tiny, tmp_path: Path) -> None:
    source, name = changed(tiny("LlamaForCausalLM"), tmp_path / "source", lambda w: w[3].zero_())
    run(source, tmp_path / "q", QuantizeWeights(bits=4, group_size=16, scale_search=search))  # type: ignore[arg-type]
    weight = dict(read_dequantized(tmp_path / "q"))[name]
    assert (weight[3] == 0).all()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, tiny: Tiny, tmp_path: Path) -> None:
    source, name = changed(tiny("LlamaForCausalLM"), tmp_path / "source", lambda w: w[5, 7].fill_(value))
    with pytest.raises(InvalidRequest) as caught:
        run(source, tmp_path / "q", QuantizeWeights())
    assert caught.value.code == "non_finite_weights"
    assert name in caught.value.detail
    assert list((tmp_path / "q").iterdir()) == []


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


def test_a_group_size_that_does_not_divide_names_layers_and_one_that_does(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        run(tiny("LlamaForCausalLM"), tmp_path / "q", QuantizeWeights(group_size=HIDDEN // 4 * 3))
    assert caught.value.code == "group_size_does_not_divide"
    assert "model.layers.0.mlp.down_proj (128 inputs)" in caught.value.detail
    assert "group_size 32 divides all layers" in (caught.value.hint or "")


def test_a_quantized_model_is_not_quantized_again(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("LlamaForCausalLM"), tmp_path / "q", QuantizeWeights())
    again = StepContext(
        source=tmp_path / "q",
        target=tmp_path / "qq",
        original=tmp_path / "q",
        facts=facts_of(tiny("LlamaForCausalLM")),
    )
    with pytest.raises(UnsupportedForModel, match="already quantized"):
        run_step(QuantizeWeights(), again)


def test_ignoring_every_layer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No layer is left"):
        run(tiny("LlamaForCausalLM"), tmp_path / "q", QuantizeWeights(ignore=("*",)))


def test_progress_rises_to_one_and_may_stop_the_work(tiny: Tiny, tmp_path: Path) -> None:
    seen: list[float] = []
    run(tiny("LlamaForCausalLM"), tmp_path / "q", QuantizeWeights(), progress=lambda f, _: seen.append(f))
    assert seen == sorted(seen)
    assert seen[-1] == 1

    def stop(fraction: float, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny("LlamaForCausalLM"), tmp_path / "stopped", QuantizeWeights(), progress=stop)
    assert list((tmp_path / "stopped").iterdir()) == []
