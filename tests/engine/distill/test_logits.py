from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, changed, facts_of, tiny_model, write_text

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import ARCHITECTURES, block_index
from app.spec.distill import DistillLogits
from app.spec.quantize import QuantizeWeights
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.distill.logits import distill_logits
from workers.engine.distill.objectives import head_of, pools_first_token
from workers.engine.distill.texts import TrainingText, document_text, stream_text
from workers.engine.technique import StepContext, StepOutcome, run_step

QUICK: dict[str, Any] = {
    # Without repair there is more to learn in twelve steps.
    "student": {"source": "depth_cut", "repair": False},
    "max_steps": 12,
    "evaluate_every": 4,
    "batch_size": 4,
    "sequence_length": 32,
    "learning_rate": 2e-3,
}
MODEL = {"source": "model", "model": "mdl_1"}
KINDS = ["LlamaForCausalLM", "Gemma2ForCausalLM", "BertModel", "DistilBertForSequenceClassification", "MPNetForMaskedLM"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("training") / "text.txt", documents=120)


def _run(original: Path, target: Path, text: Path, spec: dict[str, Any], **extra: Any) -> StepOutcome:
    target.mkdir(parents=True)
    context = StepContext(
        **{"source": original, "target": target, "original": original, "facts": facts_of(original)}
        | {"training_text": text}
        | extra
    )
    return distill_logits(DistillLogits(**(QUICK | spec)), context)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_cut_student_learns_and_reloads(
    architecture: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    original = tiny(architecture)
    if architecture.endswith("Classification"):
        # One made at random says nearly the same of every text, and nothing could be learned of it.
        original = changed(
            original, tmp_path / "certain", lambda tensors: tensors["classifier.weight"].mul_(50)
        )
    seen: list[float] = []
    spec = {"student": {"source": "depth_cut", "drop_ratio": 0.5}}
    outcome = _run(original, tmp_path / "out", text, spec, progress=lambda share, message: seen.append(share))
    assert outcome.warnings == ()
    assert outcome.metrics["held_out_loss_after"] < outcome.metrics["held_out_loss_before"]
    assert {layer.name for layer in outcome.layers} == {f.name for f in facts_of(original).compressible()}
    removed = {block_index(layer.name) for layer in outcome.layers if layer.action == "removed"}
    assert removed == {int(block) for block in outcome.metrics["blocks_removed"].split()}
    trained = [layer for layer in outcome.layers if layer.action == "trained"]
    assert len(trained) == len(outcome.layers) // 2
    assert all(layer.relative_error > 0 for layer in trained)
    assert facts_of(tmp_path / "out").num_blocks == BLOCKS // 2
    load_model(tmp_path / "out")
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "certain"}


def test_same_seed_same_bytes_and_another_seed_others(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    contents = []
    # A repaired one, made at random, has too little left to learn: the best state may be the first.
    spec = {"student": {"source": "depth_cut", "repair": False}}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _run(tiny("LlamaForCausalLM"), tmp_path / name / "out", text, spec, seed=seed)
        contents.append((tmp_path / name / "out" / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_zeros_of_an_earlier_step_stay_zero(tmp_path: Path, text: Path) -> None:
    original = tiny_model("LlamaForCausalLM", tmp_path / "original")
    source = tiny_model("LlamaForCausalLM", tmp_path / "source")
    state = load_file(source / "model.safetensors")
    masks = {f.name: torch.rand(f.shape) < 0.5 for f in facts_of(source).compressible()}
    save_file(
        {n: t.masked_fill(masks[n], 0) if n in masks else t for n, t in state.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    outcome = _run(original, tmp_path / "out", text, {"student": {"source": "previous_step"}}, source=source)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool((after[name][mask] == 0).all()) for name, mask in masks.items())
    assert all(layer.action == "trained" and 0.3 < layer.sparsity < 0.7 for layer in outcome.layers)
    assert outcome.warnings == ()


def test_weights_return_to_the_dtype_they_came_in(tmp_path: Path, text: Path) -> None:
    original = tiny_model("LlamaForCausalLM", tmp_path / "original", dtype=torch.bfloat16)
    _run(original, tmp_path / "out", text, {"max_steps": 4})
    assert {fact.dtype for fact in facts_of(tmp_path / "out").tensors} == {"BF16"}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_student_that_gets_worse_is_left_untrained(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    original = tiny("LlamaForCausalLM")
    spec = {"student": {"source": "previous_step"}, "learning_rate": 0.5, "hard_label_weight": 0.0}
    outcome = _run(original, tmp_path / "out", text, spec)
    assert "kept as it was" in outcome.warnings[0]
    assert {layer.action for layer in outcome.layers} == {"untouched"}
    after, before = (load_file(d / "model.safetensors") for d in (tmp_path / "out", original))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_uploaded_student_of_another_width_learns(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    student = tiny_model(
        "LlamaForCausalLM", tmp_path / "student", hidden_size=32, num_hidden_layers=2, head_dim=8, seed=5
    )
    outcome = _run(tiny("LlamaForCausalLM"), tmp_path / "out", text, {"student": MODEL}, student=student)
    assert outcome.warnings == ()
    assert facts_of(tmp_path / "out").hidden_size == 32


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel"])
def test_hidden_states_are_taught_beside_the_outputs(
    architecture: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    student = tiny_model(
        architecture, tmp_path / "student", hidden_size=32, num_hidden_layers=2, seed=5,
        **({"head_dim": 8} if architecture.startswith("Llama") else {}),
    )  # fmt: skip
    shutil.copyfile(tiny(architecture) / "tokenizer.json", student / "tokenizer.json")
    plain, matched = (
        _run(
            tiny(architecture),
            tmp_path / str(weight),
            text,
            # Enough steps for the projections to be learned first.
            {"student": MODEL, "hidden_weight": weight, "max_steps": 40, "evaluate_every": 10},
            student=student,
        )
        for weight in (0.0, 0.1)
    )
    # Before training it is the same loss, of the outputs alone.
    assert matched.metrics["held_out_loss_before"] == plain.metrics["held_out_loss_before"]
    assert matched.curves["training_loss"][0][1] > plain.curves["training_loss"][0][1]
    # Not the held-out loss: what a vocabulary learned anew each time makes of a hundred texts decides which way it goes.
    losses = [loss for _, loss in matched.curves["training_loss"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert facts_of(tmp_path / "0.1").tensors == facts_of(student).tensors


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel"])
def test_relations_are_taught_beside_the_outputs(
    architecture: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    plain, related = (
        _run(tiny(architecture), tmp_path / str(weight), text, {"relation_weight": weight})
        for weight in (0.0, 1.0)
    )
    assert related.metrics["held_out_loss_before"] == plain.metrics["held_out_loss_before"]
    assert related.curves["training_loss"][0][1] > plain.curves["training_loss"][0][1]
    assert related.curves["training_loss"][-1][1] < related.curves["training_loss"][0][1]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel"])
def test_attention_is_taught_beside_the_outputs(
    architecture: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    plain, attentive = (
        _run(tiny(architecture), tmp_path / str(weight), text, {"attention_weight": weight, "max_steps": 1})
        for weight in (0.0, 100.0)
    )
    # Before training it is the same loss, of the outputs alone; attention that shows itself is computed in another order.
    before = plain.metrics["held_out_loss_before"]
    assert attentive.metrics["held_out_loss_before"] == pytest.approx(before, rel=1e-3)
    assert attentive.curves["training_loss"][0][1] > 1.001 * plain.curves["training_loss"][0][1]


def test_what_the_teacher_says_is_kept_and_the_teacher_let_go(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    live, cached, few = (
        _run(tiny("LlamaForCausalLM"), tmp_path / str(k), text, {"cached_logits": k}) for k in (None, 320, 8)
    )
    assert live.metrics["cache_bytes_per_token"] is None
    assert cached.metrics["cache_bytes_per_token"] == 4 * 320
    assert few.metrics["cache_bytes_per_token"] == 4 * 8
    for (_, expected), (_, ours) in zip(
        live.curves["held_out_loss"], cached.curves["held_out_loss"], strict=True
    ):
        assert ours == pytest.approx(expected, rel=0.02)
    assert few.metrics["held_out_loss_before"] < cached.metrics["held_out_loss_before"]
    assert few.metrics["held_out_loss_after"] < few.metrics["held_out_loss_before"]


def test_a_killed_cache_is_gone_on_with(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    spec, said = {"cached_logits": 8, "max_steps": 4}, []

    def stop(share: float, message: str) -> None:
        if message.startswith("what the teacher says of text 12"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(
            tiny("LlamaForCausalLM"), tmp_path / "a", text, spec, journal=tmp_path / "journal", progress=stop
        )
    _run(
        tiny("LlamaForCausalLM"), tmp_path / "b", text, spec, journal=tmp_path / "journal",
        progress=lambda share, message: said.append(message),
    )  # fmt: skip
    _run(tiny("LlamaForCausalLM"), tmp_path / "c", text, spec)
    assert not any(message.startswith("what the teacher says of text 8 ") for message in said)
    files = [tmp_path / name / "model.safetensors" for name in ("b", "c")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("bits", "rate"), [(4, 2e-4), (2, 2e-3)])
def test_what_was_trained_for_a_grid_is_stored_without_loss(
    bits: int, rate: float, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    original = tiny_model("LlamaForCausalLM", tmp_path / "original", dtype=torch.bfloat16)
    spec = {
        "student": {"source": "teacher"},
        "for_grid": {"bits": bits, "group_size": 32},
        "hard_label_weight": 0.0,
    }
    outcome = _run(original, tmp_path / "out", text, spec | {"learning_rate": rate})
    assert outcome.metrics["held_out_loss_after"] < outcome.metrics["held_out_loss_before"]
    (tmp_path / "stored").mkdir()
    context = StepContext(
        source=tmp_path / "out", target=tmp_path / "stored", original=original, facts=facts_of(original)
    )
    stored = run_step(QuantizeWeights(bits=bits, group_size=32, symmetric=True), context)
    assert len(stored.layers) == len(outcome.layers)
    # What is left is bfloat16's own rounding of scale times code.
    assert max(layer.relative_error for layer in stored.layers) < 0.003
    (tmp_path / "untrained").mkdir()
    context = dataclasses.replace(context, source=original, target=tmp_path / "untrained")
    rounded = run_step(QuantizeWeights(bits=bits, group_size=32, symmetric=True), context)
    assert min(layer.relative_error for layer in rounded.layers) > 0.003


def test_zeros_stay_zero_on_a_grid(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    source = changed(tiny("LlamaForCausalLM"), tmp_path / "source", _half_to_zero)
    spec = {"for_grid": {"bits": 4, "group_size": 16}, "student": {"source": "previous_step"}}
    outcome = _run(tiny("LlamaForCausalLM"), tmp_path / "out", text, spec, source=source)
    before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "out"))
    names = [layer.name for layer in outcome.layers if layer.action == "trained"]
    assert len(names) == len(outcome.layers)
    assert all(bool((after[name][before[name] == 0] == 0).all()) for name in names)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel"])
def test_low_rank_recovery_leaves_a_plain_student_that_learned(
    architecture: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    spec = {"lora_rank": 4, "student": {"source": "depth_cut", "drop_ratio": 0.5}}
    outcome = _run(tiny(architecture), tmp_path / "out", text, spec)
    assert outcome.warnings == ()
    cut = {f.name for f in facts_of(tiny(architecture)).tensors if (block_index(f.name) or 0) < BLOCKS // 2}
    assert {f.name for f in facts_of(tmp_path / "out").tensors} == cut
    load_model(tmp_path / "out")
    assert all(layer.relative_error > 0 for layer in outcome.layers if layer.action == "trained")


def test_low_rank_recovery_of_a_pruned_student_is_refused(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = changed(tiny("LlamaForCausalLM"), tmp_path / "source", _half_to_zero)
    spec = {"lora_rank": 4, "student": {"source": "previous_step"}}
    with pytest.raises(InvalidRequest, match="fill their zeros"):
        _run(tiny("LlamaForCausalLM"), tmp_path / "out", text, spec, source=source)


def _half_to_zero(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = torch.nn.functional.dropout(tensor, 0.5)


def test_a_narrower_encoder_is_taught_similarities_alone(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    original = tiny("BertModel")
    student = tiny_model("BertModel", tmp_path / "student", hidden_size=32, num_hidden_layers=2, seed=5)
    shutil.copyfile(original / "tokenizer.json", student / "tokenizer.json")
    outcome = _run(original, tmp_path / "out", text, {"student": MODEL}, student=student)
    assert outcome.metrics["held_out_loss_after"] < outcome.metrics["held_out_loss_before"]


def test_a_student_of_another_kind_or_vocabulary_is_refused(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedForModel, match="cannot learn from"):
        _run(tiny("LlamaForCausalLM"), tmp_path / "a", text, {"student": MODEL}, student=tiny("RobertaModel"))
    with pytest.raises(UnsupportedForModel, match="vocabular"):
        _run(tiny("BertModel"), tmp_path / "b", text, {"student": MODEL}, student=tiny("RobertaModel"))


def test_a_classifier_of_other_classes_is_refused(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    name = "BertForSequenceClassification"
    student = tiny_model(name, tmp_path / "student", num_labels=5)
    shutil.copyfile(tiny(name) / "tokenizer.json", student / "tokenizer.json")
    with pytest.raises(UnsupportedForModel, match="5 classes"):
        _run(tiny(name), tmp_path / "out", text, {"student": MODEL}, student=student)


@pytest.mark.parametrize("make", [stream_text, document_text])
def test_held_out_text_is_the_tail_and_never_trained_on(
    make: Any, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny("RobertaModel")
    tokenizer = load_tokenizer(directory)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the {i} letter" for i in range(200)))
    spec = DistillLogits(**(QUICK | {"held_out_fraction": 0.25, "max_steps": 1000, "sequence_length": 16}))
    training = make(spec, path, tokenizer, facts_of(directory), seed=0)
    seen = tokenizer.decode(torch.cat(training.sequences), skip_special_tokens=True).replace(" ", "")
    held = tokenizer.decode(
        torch.cat([batch.ids.flatten() for batch in training.held_out]), skip_special_tokens=True
    ).replace(" ", "")
    assert "10letter" in seen
    assert "160letter" not in seen
    assert "160letter" in held
    assert "140letter" not in held


def test_too_little_text_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", documents=2)
    for architecture in ("LlamaForCausalLM", "BertModel"):
        with pytest.raises(InvalidRequest) as caught:
            _run(tiny(architecture), tmp_path / architecture, short, {"sequence_length": 64})
        assert caught.value.code == "text_too_short"


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.endswith("CausalLM")])
@torch.inference_mode()
def test_the_head_gives_the_models_own_logits(architecture: str, tmp_path: Path) -> None:
    settings = {
        "Gemma2ForCausalLM": {"final_logit_softcapping": 2.0},
        "GraniteForCausalLM": {"logits_scaling": 8.0},
    }
    model = load_model(tiny_model(architecture, tmp_path, **settings.get(architecture, {})))
    ids = torch.arange(20)[None] * 7 % 300
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = head_of(model)
    logits = hidden @ head.weight.T * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)


def test_cls_pooling_is_read_from_the_models_own_file(tmp_path: Path) -> None:
    assert not pools_first_token(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert pools_first_token(tmp_path)


def test_batches_hold_texts_of_like_length_and_an_epoch_every_text() -> None:
    lengths = [3 + 7 * number % 40 for number in range(64)]
    sequences = tuple(torch.full((length,), number) for number, length in enumerate(lengths))
    text = TrainingText(sequences, (), batch_size=4, padding=0, seed=1)
    batches = list(itertools.islice(text.batches(), 32))
    for epoch in (batches[:16], batches[16:]):
        assert sorted(int(row[0]) for batch in epoch for row in batch.ids) == list(range(64))
    padding = sum(int((1 - batch.mask).sum()) for batch in batches)
    assert padding < 0.15 * sum(batch.mask.numel() for batch in batches)
    widths = [batch.ids.shape[1] for batch in batches[:16]]
    assert widths != sorted(widths)
    again = list(itertools.islice(text.batches(), 32))
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(batches, again, strict=True))


def test_every_held_out_text_is_looked_at_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny("RobertaModel")
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the {i:03d} letter" for i in range(50)))
    spec = DistillLogits(**(QUICK | {"held_out_fraction": 0.18, "batch_size": 4}))
    training = document_text(spec, path, load_tokenizer(directory), facts_of(directory), seed=0)
    assert [len(batch.ids) for batch in training.held_out] == [4, 5]
    texts = load_tokenizer(directory).batch_decode(
        [ids for batch in training.held_out for ids in batch.ids], skip_special_tokens=True
    )
    assert len({text.split()[1] for text in texts}) == 9


def test_a_batch_of_two_teaches_no_similarities(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    original = tiny("BertModel")
    student = tiny_model("BertModel", tmp_path / "student", hidden_size=32, num_hidden_layers=2, seed=5)
    shutil.copyfile(original / "tokenizer.json", student / "tokenizer.json")
    with pytest.raises(InvalidRequest, match="2 are too few"):
        _run(original, tmp_path / "out", text, {"student": MODEL, "batch_size": 2}, student=student)


_UNTIL_A_STEP = """
import os, signal, sys
from pathlib import Path
from tiny_models import facts_of
from app.spec.distill import DistillLogits
from workers.engine.distill.logits import distill_logits
from workers.engine.technique import StepContext

spec, original, target, text, journal = sys.argv[1:]

def progress(share, message):
    if message.startswith("step 10"):
        os.kill(os.getpid(), signal.SIGKILL)

original = Path(original)
distill_logits(DistillLogits.model_validate_json(spec), StepContext(
    source=original, target=Path(target), original=original, facts=facts_of(original), training_text=Path(text),
    journal=Path(journal), progress=progress,
))
"""


def test_a_killed_training_goes_on_to_the_same_losses_and_bytes(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    original, journal, killed = tiny("LlamaForCausalLM"), tmp_path / "journal", tmp_path / "killed"
    killed.mkdir()
    whole = _run(original, tmp_path / "whole", text, {})
    spec = DistillLogits(**QUICK).model_dump_json()
    arguments = [spec, *map(str, (original, killed, text, journal))]
    process = subprocess.run(
        [sys.executable, "-c", _UNTIL_A_STEP, *arguments],
        check=False,
        # Sums come out the same with the same number of threads alone.
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert process.returncode == -signal.SIGKILL
    steps: list[str] = []
    resumed = _run(
        original, tmp_path / "resumed", text, {}, journal=journal, progress=lambda share, message: steps.append(message)
    )  # fmt: skip
    assert not any(message.startswith("step 1 ") for message in steps)
    assert resumed.curves == whole.curves
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not journal.exists()


def test_recomputed_activations_give_the_same_student(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    for name, recompute in (("kept", False), ("recomputed", True)):
        _run(tiny("BertModel"), tmp_path / name, text, {"gradient_checkpointing": recompute, "max_steps": 4})
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("kept", "recomputed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
