"""The contract of a technique, held against every one there is on tiny models of every architecture.

A new technique is found by its spec class; only what it promises about its result is told here, in PROMISES.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from technique_runs import (
    REPEATABLE,
    REPRESENTATIVE,
    Case,
    Run,
    all_cases,
    context_for,
    digests,
    run_case,
    tensors_of,
)
from tiny_models import BLOCKS, EXPERTS, HEAD_DIM, HIDDEN, INTERMEDIATE, facts_of
from transformers import AutoModelForCausalLM

from app.spec.architectures import ARCHITECTURES, block_index, is_router
from app.spec.attention_heads import counts_in, head_axis, reads_heads, with_groups
from app.spec.compression import STEP_CLASSES, CompressionSpec
from app.spec.feed_forward import can_fill_gaps, channel_axis, is_reader, with_width
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES as GGUF_ARCHITECTURES
from app.spec.gguf_layout import gguf_tensors
from app.spec.plan import plan_job
from app.spec.prune_experts import expert_number, has_row_per_expert, with_expert_number, with_experts
from app.spec.prune_hidden import with_hidden_width
from app.spec.quantize import QuantizedWeights
from workers.engine.architectures.loading import load_model, load_tokenizer, loader_of
from workers.engine.export.dynamic_int8 import load_dynamic_int8
from workers.engine.export.gguf.reader import read_configuration
from workers.engine.export.nf4_reader import load_nf4
from workers.engine.technique import implemented, run_step

CASES = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.is_slow else []) for case in all_cases()
]
# A second run each, for what does not depend on the architecture.
REPEATED = [
    pytest.param(case, id=str(case))
    for case in all_cases()
    if case.architecture in REPEATABLE.get(case.technique, REPRESENTATIVE) and not case.is_slow
]
# What runs on the device that a job is given; whatever ends in ONNX or GGUF is written by a CPU in the end.
_ON_GPU = [
    pytest.param(case, id=str(case))
    for case in all_cases()
    if case.architecture in ("LlamaForCausalLM", "BertModel", "GPT2LMHeadModel", "MixtralForCausalLM")
    and case.technique not in ("optimize.onnx", "quantize.onnx", "quantize.dynamic")
]
_WEIGHT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|model\.onnx(_data)?|model\.gguf"
)
_TOKENS = "The river runs past the old mill and under the bridge."


class Stopped(Exception):  # noqa: N818 - what a cancelled job raises is no error
    """Raised by progress to cancel."""


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], Run]]:
    """Run a case the first time it is asked for."""
    done: dict[str, Run] = {}

    def run(case: Case) -> Run:
        key = str(case)
        if key not in done:
            target = tmp_path_factory.mktemp("target")
            done[key] = run_case(case, tiny(case.architecture), target, tiny_text)
        return done[key]

    return run


def test_every_spec_class_has_code_and_all_code_has_a_spec_class() -> None:
    assert implemented() == frozenset(STEP_CLASSES)


@pytest.mark.parametrize("case", CASES)
def test_result_is_read_by_the_loader_it_is_written_for(case: Case, runs: Callable[[Case], Run]) -> None:
    run = runs(case)
    tokens = load_tokenizer(run.target)(_TOKENS, return_tensors="pt")
    output = _LOADERS[case.step.output_format](run.target, tokens)
    assert np.isfinite(output).all()
    assert output.std() > 0
    if output.ndim == 3:
        assert output.shape[:2] == tuple(tokens["input_ids"].shape)


@pytest.mark.parametrize("case", CASES)
def test_every_compressible_layer_is_accounted_for_once(case: Case, runs: Callable[[Case], Run]) -> None:
    run = runs(case)
    names = [layer.name for layer in run.outcome.layers]
    assert sorted(names) == sorted(tensor.name for tensor in facts_of(run.source).compressible())
    assert all(layer.reason for layer in run.outcome.layers if layer.action == "untouched")


@pytest.mark.parametrize("case", CASES)
def test_result_is_what_was_promised(case: Case, runs: Callable[[Case], Run]) -> None:
    _PROMISES[case.technique](runs(case))


@pytest.mark.parametrize("case", CASES)
def test_target_holds_weights_and_side_files_alone_and_source_is_untouched(
    case: Case, runs: Callable[[Case], Run]
) -> None:
    run = runs(case)
    assert run.source_before == run.source_after
    written = set(digests(run.target))
    side_files = {name for name in run.source_before if not _WEIGHT_FILES.fullmatch(name)}
    assert {name for name in written if not _WEIGHT_FILES.fullmatch(name)} == side_files
    assert written - side_files
    assert all((run.target / name).stat().st_mode & 0o044 == 0o044 for name in written)


@pytest.mark.parametrize("case", CASES)
def test_progress_grows_from_0_to_1(case: Case, runs: Callable[[Case], Run]) -> None:
    shares = [share for share, _ in runs(case).progress]
    assert len(shares) >= 2
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", _ON_GPU)
def test_on_a_gpu_the_promises_are_the_same(
    case: Case, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    run = run_case(case, tiny(case.architecture), tmp_path, tiny_text, device="cuda")
    _PROMISES[case.technique](run)
    tokens = load_tokenizer(run.target)(_TOKENS, return_tensors="pt")
    assert np.isfinite(_LOADERS[case.step.output_format](run.target, tokens)).all()


@pytest.mark.parametrize("case", REPEATED)
def test_same_seed_gives_the_same_bytes(
    case: Case, runs: Callable[[Case], Run], tiny_text: Path, tmp_path: Path
) -> None:
    first = runs(case)
    second = run_case(case, first.source, tmp_path, tiny_text)
    if second.outcome.metrics.get("kept") == first.outcome.metrics.get("kept"):
        assert digests(tmp_path) == digests(first.target)
    # A technique that keeps what measures faster may keep something else when a run takes microseconds.
    lasting = [name for name in first.outcome.metrics if name.endswith(("_bytes", "_cosine", "_difference"))]
    assert [second.outcome.metrics[name] for name in lasting] == [
        first.outcome.metrics[name] for name in lasting
    ]


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("case", REPEATED)
def test_progress_that_raises_stops_the_technique_at_once(
    case: Case, calls: int, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    count = 0

    def progress(share: float, message: str) -> None:
        nonlocal count
        count += 1
        if count >= calls:
            raise Stopped

    context = context_for(case.step, tiny(case.architecture), tmp_path, tiny_text, progress=progress)
    with pytest.raises(Stopped):
        run_step(case.step, context)
    # Threads that were under way may each say one thing more.
    assert count <= calls + context.threads


def _torch_output(directory: Path, tokens: dict[str, torch.Tensor]) -> np.ndarray:
    with warnings.catch_warnings(), torch.inference_mode():
        # compressed-tensors and transformers deprecate parts of each other while loading.
        warnings.simplefilter("ignore", DeprecationWarning)
        return load_model(directory)(**tokens)[0].numpy()


def _onnx_output(directory: Path, tokens: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {node.name: tokens[node.name].numpy() for node in session.get_inputs()})[0]


def _gguf_output(directory: Path, tokens: dict[str, torch.Tensor]) -> np.ndarray:
    # Alone, transformers takes Qwen3's heads for 128 wide, whatever the file says.
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file="model.gguf",
        config=read_configuration(directory / "model.gguf"),
        dtype=torch.float32,
    )
    with torch.inference_mode():
        return model(**tokens)[0].numpy()


def _dynamic_int8_output(directory: Path, tokens: dict[str, torch.Tensor]) -> np.ndarray:
    model, info = load_dynamic_int8(directory, loader_of(directory))
    assert not [name for name in info["missing_keys"] if block_index(name) is not None]
    with torch.inference_mode():
        return model(**tokens)[0].numpy()


def _nf4_output(directory: Path, tokens: dict[str, torch.Tensor]) -> np.ndarray:
    model, info = load_nf4(directory, loader_of(directory))
    assert not [name for name in info["missing_keys"] if block_index(name) is not None]
    with torch.inference_mode():
        return model(**tokens)[0].numpy()


_LOADERS = {
    "safetensors": _torch_output,
    "compressed-tensors": _torch_output,
    "onnx": _onnx_output,
    "gguf": _gguf_output,
    "torch-dynamic-int8": _dynamic_int8_output,
    "bitsandbytes": _nf4_output,
}


def _promises_of_quantized_weights(run: Run) -> None:
    step = run.case.step
    assert isinstance(step, QuantizedWeights)
    tensors = tensors_of(run.target)
    most = {8: 0.02, 4: 0.2, 3: 0.4, 2: 0.8}[step.bits] if step.number_format != "fp8" else 0.05
    for layer in run.outcome.layers:
        if is_router(layer.name):
            assert layer.action == "untouched"
            continue
        stem = layer.name.removesuffix("weight")
        parts = [
            t for name, t in tensors.items() if name.startswith(stem) and not name.endswith(("shape", "bias"))
        ]
        stored = sum(part.numel() * part.element_size() for part in parts) * 8 / layer.parameters
        assert layer.name not in tensors or tensors[layer.name].element_size() == 1
        assert layer.bits == pytest.approx(stored, rel=0.1)
        assert 0 < layer.relative_error < most


def _promises_of_gguf(run: Run) -> None:
    step = run.case.step
    assert isinstance(step, QuantizeGguf)
    stored = {t.name: t for t in gguf.GGUFReader(run.target / "model.gguf").tensors}
    expected = gguf_tensors(facts_of(run.source).tensors, GGUF_ARCHITECTURES[run.case.architecture], step.mix)
    assert {t.name: (t.format.name, t.nbytes) for t in expected} == {
        name: (t.tensor_type.name, t.n_bytes) for name, t in stored.items()
    }
    by_source = {t.source: stored[t.name] for t in expected}
    for layer in run.outcome.layers:
        tensor = by_source[layer.name]
        assert layer.bits == 8 * tensor.n_bytes / tensor.n_elements
        # These models' inputs are no multiple of 256: Q4_K and Q5_K give way to formats of five bits.
        assert 0 < layer.relative_error < {"Q8_0": 0.01, "Q4_0": 0.12}.get(tensor.tensor_type.name, 0.08)


def _promises_of_quantize_dynamic(run: Run) -> None:
    tensors, before = tensors_of(run.target), tensors_of(run.source)
    for layer in (found for found in run.outcome.layers if found.action == "quantized"):
        codes, scale = tensors[f"{layer.name}_int8"], tensors[f"{layer.name}_scale"]
        assert layer.name not in tensors
        assert (codes.dtype, scale.shape) == (torch.int8, (1,))
        assert codes.int().abs().max() >= 127
        assert torch.allclose(codes * scale, before[layer.name].float(), atol=0.51 * scale.item())
        assert 0 < layer.relative_error < 0.05
        assert layer.bits == 8 + 32 / layer.parameters
    others = [name for name in tensors if not name.endswith(("_int8", "_scale"))]
    assert others
    assert all(torch.equal(tensors[name], before[name]) for name in others)


def _promises_of_zeros(run: Run) -> None:
    """As many zeros as asked for, in the pattern asked for, and the rest as it was unless it makes up for them."""
    tensors, before = tensors_of(run.target), tensors_of(run.source)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    zeros = total = 0
    pruned = [layer for layer in run.outcome.layers if layer.action == "pruned"]
    for layer in pruned:
        tensor = tensors[layer.name]
        share = (tensor == 0).double().mean().item()
        assert layer.sparsity == pytest.approx(share, abs=1e-6)
        kept = tensor != 0
        moves = getattr(run.case.step, "compensate", False)
        assert torch.equal(tensor[kept], before[layer.name][kept]) != moves
        zeros, total = zeros + (tensor == 0).sum().item(), total + tensor.numel()
        if run.case.step.pattern != "unstructured":
            gone, group = (int(part) for part in run.case.step.pattern.split(":"))
            inputs_last = tensor.t() if ARCHITECTURES[run.case.architecture].inputs_first else tensor
            assert ((inputs_last.reshape(-1, group) == 0).sum(dim=1) == gone).all()
    assert zeros / total == pytest.approx(run.case.step.sparsity, abs=1e-3)
    others = [name for name in tensors if name not in {layer.name for layer in pruned}]
    assert all(torch.equal(tensors[name], before[name]) for name in others)


def _promises_of_prune_training(run: Run) -> None:
    """As many zeros as the last cut asked for, or as many as gates closed; all weights are trained."""
    tensors, before = tensors_of(run.target), tensors_of(run.source)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    pruned = [layer for layer in run.outcome.layers if layer.action == "pruned"]
    assert [layer for layer in run.outcome.layers if is_router(layer.name)] == [
        layer for layer in run.outcome.layers if layer.action == "trained"
    ]
    for layer in pruned:
        share = (tensors[layer.name] == 0).double().mean().item()
        assert layer.sparsity == pytest.approx(share, abs=1e-6)
        assert not torch.equal(
            tensors[layer.name][tensors[layer.name] != 0], before[layer.name][tensors[layer.name] != 0]
        )
    weights = sum(layer.parameters for layer in pruned)
    sparsity = sum(layer.sparsity * layer.parameters for layer in pruned) / weights
    assert run.outcome.metrics["sparsity"] == pytest.approx(sparsity, abs=1e-4)
    points = run.case.step.points
    assert sparsity == pytest.approx(points[-1][1], abs=1e-3) if points else sparsity > 0.05


def _promises_of_fewer_blocks(run: Run, blocks: int) -> None:
    facts, before = facts_of(run.target), facts_of(run.source)
    indices = {block_index(tensor.name) for tensor in facts.tensors} - {None}
    assert facts.num_blocks == blocks
    assert indices == set(range(blocks))
    assert facts.weight_bytes < before.weight_bytes
    removed = {block_index(layer.name) for layer in run.outcome.layers if layer.action == "removed"}
    assert len(removed) == BLOCKS - blocks


def _promises_of_prune_depth(run: Run) -> None:
    architecture = ARCHITECTURES[run.case.architecture]
    _promises_of_fewer_blocks(run, BLOCKS - 1)
    before, after = tensors_of(run.source), tensors_of(run.target)
    removed = {block_index(layer.name) for layer in run.outcome.layers if layer.action == "removed"}
    kept = [index for index in range(BLOCKS) if index not in removed]
    for name, tensor in after.items():
        new = block_index(name)
        origin = name if new is None else re.sub(rf"\.{new}\.", f".{kept[new]}.", name, count=1)
        refitted = new is not None and kept[new] + 1 in removed and is_reader(origin, architecture)
        refitted &= can_fill_gaps(architecture)
        assert torch.equal(tensor, before[origin]) != refitted or origin.endswith(".bias")


def _promises_of_prune_width(run: Run) -> None:
    """Half the channels are left, with their own rows in the layers that write them; all else is as it was."""
    architecture = ARCHITECTURES[run.case.architecture]
    tensors, before = tensors_of(run.target), tensors_of(run.source)
    shapes = {
        t.name: t.shape for t in with_width(facts_of(run.source).tensors, architecture, INTERMEDIATE // 2)
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    pruned = {layer.name for layer in run.outcome.layers if layer.action == "pruned"}
    assert pruned == {t.name for t in facts_of(run.source).compressible() if shapes[t.name] != t.shape}
    assert len(pruned) >= 2 * BLOCKS
    for name, tensor in tensors.items():
        axis = channel_axis(name, architecture)
        if axis is None:
            # A bias of the layer that reads the channels takes the mean of what went.
            is_moved = is_reader(name.removesuffix("bias") + "weight", architecture)
            assert torch.equal(tensor, before[name]) != is_moved
        elif not is_reader(name, architecture):
            rows = {
                tuple(row)
                for row in before[name]
                .movedim(axis.dimension, 0)
                .reshape(axis.copies * INTERMEDIATE, -1)
                .tolist()
            }
            kept = tensor.movedim(axis.dimension, 0).reshape(axis.copies * INTERMEDIATE // 2, -1).tolist()
            assert {tuple(row) for row in kept} <= rows
    written = sum(file.stat().st_size for file in run.target.glob("*.safetensors"))
    assert plan_job(CompressionSpec(steps=(run.case.step,)), facts_of(run.source)).output_bytes == written
    assert run.outcome.metrics["width_before"] == INTERMEDIATE
    assert run.outcome.metrics["width_after"] == INTERMEDIATE // 2
    assert 0 < run.outcome.metrics["relative_output_error"] < 1


def _promises_of_prune_heads(run: Run) -> None:
    """One group of the two is left, with its own rows in the projections that write it; all else is as it was."""
    architecture = ARCHITECTURES[run.case.architecture]
    tensors, before = tensors_of(run.target), tensors_of(run.source)
    counts = counts_in(facts_of(run.source))
    shapes = {t.name: t.shape for t in with_groups(facts_of(run.source).tensors, architecture, counts, 1)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    pruned = {layer.name for layer in run.outcome.layers if layer.action == "pruned"}
    assert pruned == {t.name for t in facts_of(run.source).compressible() if shapes[t.name] != t.shape}
    assert len(pruned) >= 2 * BLOCKS
    for name, tensor in tensors.items():
        axis = head_axis(name, architecture)
        if axis is None:
            # A bias of the layer that reads the heads takes the mean of what went.
            is_moved = reads_heads(name.removesuffix("bias") + "weight", architecture)
            assert torch.equal(tensor, before[name]) != is_moved
        elif not reads_heads(name, architecture):
            parts = [counts.channels(of_queries=kind) for kind in axis.of_queries]
            old = before[name].split([counts.groups * channels for channels in parts])
            for now, was, channels in zip(tensor.split(parts), old, parts, strict=True):
                assert any(torch.equal(now, group) for group in was.split(channels))
    written = sum(file.stat().st_size for file in run.target.glob("*.safetensors"))
    assert plan_job(CompressionSpec(steps=(run.case.step,)), facts_of(run.source)).output_bytes == written
    assert 0 < run.outcome.metrics["relative_output_error"] < 1


def _promises_of_prune_hidden(run: Run) -> None:
    """Three quarters of the hidden width are left, in every tensor that has it, and the configuration says so."""
    before, facts = facts_of(run.source), facts_of(run.target)
    width = HIDDEN * 3 // 4
    shapes = {t.name: t.shape for t in with_hidden_width(before.tensors, width)}
    assert facts.hidden_size == width
    assert {t.name: t.shape for t in facts.tensors} == shapes
    assert json.loads((run.target / "config.json").read_text())["head_dim"] == HEAD_DIM
    assert {layer.action for layer in run.outcome.layers} == {"pruned"}
    written = sum(file.stat().st_size for file in run.target.glob("*.safetensors"))
    assert plan_job(CompressionSpec(steps=(run.case.step,)), before).output_bytes == written
    assert load_model(run.target).num_parameters() < load_model(run.source).num_parameters()
    # Random models have no direction that could be spared: a quarter of them is a quarter of all there is.
    assert 0.1 < run.outcome.metrics["relative_output_error"] < 0.5


def _promises_of_prune_experts(run: Run) -> None:
    """Fewer experts, each as it was, under the router's rows that were theirs; all else is as it was."""
    tensors, before = tensors_of(run.target), tensors_of(run.source)
    after = run.outcome.metrics["experts_after"]
    assert after == EXPERTS * (1 - run.case.step.drop_ratio)
    removed = {layer.name for layer in run.outcome.layers if layer.action == "removed"}
    shapes = {t.name: t.shape for t in with_experts(facts_of(run.source).tensors, after)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    for name, tensor in tensors.items():
        mixture = name.partition(".experts.")[0].removesuffix(".gate.weight")
        kept = [n for n in range(EXPERTS) if not any(f"{mixture}.experts.{n}." in gone for gone in removed)]
        number = expert_number(name)
        origin = name if number is None else with_expert_number(name, kept[number])
        assert torch.equal(tensor, before[name][kept] if has_row_per_expert(name) else before[origin])
    written = sum(file.stat().st_size for file in run.target.glob("*.safetensors"))
    assert plan_job(CompressionSpec(steps=(run.case.step,)), facts_of(run.source)).output_bytes == written
    assert load_model(run.target).num_parameters() < load_model(run.source).num_parameters()


def _promises_of_distill_logits(run: Run) -> None:
    _promises_of_fewer_blocks(run, BLOCKS - 1)
    before, after = tensors_of(run.source), tensors_of(run.target)
    changed = [name for name in after if not any(torch.equal(after[name], old) for old in before.values())]
    # Three steps may teach nothing: then the student is the teacher without a block, and its layers say so.
    trained = any(layer.action == "trained" for layer in run.outcome.layers)
    assert bool(changed) == trained


def _promises_of_optimize_onnx(run: Run) -> None:
    onnx.checker.check_model(str(run.target / "model.onnx"))
    initializers = {t.name: t for t in onnx.load(run.target / "model.onnx").graph.initializer}
    kept = run.outcome.metrics["kept"]
    assert {"torch_ms", "exported_ms", "optimized_ms", "int8_ms"} <= set(run.outcome.metrics)
    quantized = [layer for layer in run.outcome.layers if layer.action == "quantized"]
    assert len(quantized) == (len(run.outcome.layers) if str(kept).startswith("int8") else 0)
    stem = load_model(run.source).base_model_prefix + "."
    for layer in quantized:
        codes = next(
            t
            for name, t in initializers.items()
            if name.removeprefix(stem) == layer.name.removeprefix(stem) + "_quantized"
        )
        assert codes.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        assert len(codes.raw_data) >= layer.parameters
        assert 0 < layer.relative_error < 0.02


def _promises_of_quantize_onnx(run: Run) -> None:
    step = run.case.step
    graph = onnx.load(run.target / "model.onnx").graph
    onnx.checker.check_model(str(run.target / "model.onnx"))
    products = [n for n in graph.node if n.op_type == "MatMulNBits"]
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    products += [n for n in graph.node if n.op_type == "MatMul" and set(n.input) <= dequantized]
    quantized = [layer for layer in run.outcome.layers if layer.action == "quantized"]
    assert len(products) == len(quantized) == len(run.outcome.layers)
    for layer in quantized:
        assert 0 < layer.relative_error < {8: 0.02, 4: 0.2}[step.bits]
        assert step.bits < layer.bits < step.bits * 1.6


_PROMISES: dict[str, Callable[[Run], None]] = {
    "quantize.weights": _promises_of_quantized_weights,
    "quantize.calibrated": _promises_of_quantized_weights,
    "quantize.gguf": _promises_of_gguf,
    "quantize.dynamic": _promises_of_quantize_dynamic,
    "prune.magnitude": _promises_of_zeros,
    "prune.calibrated": _promises_of_zeros,
    "prune.experts": _promises_of_prune_experts,
    "prune.training": _promises_of_prune_training,
    "prune.depth": _promises_of_prune_depth,
    "prune.width": _promises_of_prune_width,
    "prune.heads": _promises_of_prune_heads,
    "prune.hidden": _promises_of_prune_hidden,
    "distill.logits": _promises_of_distill_logits,
    "optimize.onnx": _promises_of_optimize_onnx,
    "quantize.onnx": _promises_of_quantize_onnx,
}
