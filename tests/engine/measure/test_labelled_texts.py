"""Classifiers measured on texts with labels: real processes, real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SENTENCES, Tensors, changed, facts_of, tiny_model, write_labelled

from app.errors import InvalidRequest
from app.spec.compression import Acceptance, CompressionSpec, Evaluation
from app.spec.quantize import QuantizeWeights
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.text import read_documents
from workers.engine.calibration.text_set import read_labels, read_text
from workers.engine.measure.acceptance import limits, verdict
from workers.engine.measure.evaluate import evaluate
from workers.engine.measure.report import build_report, render_html
from workers.engine.measure.results import Evaluated, Pair, Prepared
from workers.engine.measure.windows import load_windows, prepare_evaluation

TEXTS = [f"{sentence} {number}" for number in range(3) for sentence in SENTENCES]
NAMED = {0: "calm", 1: "LOUD", 2: "quick"}
LABELS = [("loud", "quick", "calm")[number % 3] for number in range(len(TEXTS))]
CLASSES = [(1, 2, 0)[number % 3] for number in range(len(TEXTS))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classifier")
    plain = tiny_model("BertForSequenceClassification", directory / "plain", id2label=NAMED, num_labels=3)
    # One made at random chooses the same class for every text.
    usual = logits_of(plain).mean(0)
    return changed(plain, directory / "undecided", lambda tensors: tensors["classifier.bias"].sub_(usual))


def prepare(model: Path, dataset: Path, work: Path, **evaluation: int) -> Prepared:
    return prepare_evaluation(
        model, facts_of(model), Evaluation(**evaluation), text=dataset, windows_file=work / "windows.npz"
    )


def rounded(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layer" in name:
            tensor.copy_((tensor * 4).round() / 4)


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluated, Path]:
    work = tmp_path_factory.mktemp("labelled")
    result = changed(model, work / "result", rounded)
    prepared = prepare(model, write_labelled(work / "set", TEXTS, LABELS), work, sequence_length=16)
    pair = Pair(original=model, result=result, work=work, threads=1, latency_rounds=3)
    return evaluate(pair, facts_of(model), prepared), result


def choices(model: Path) -> np.ndarray:
    return logits_of(model).argmax(-1).numpy()


def logits_of(model: Path) -> torch.Tensor:
    """By transformers alone, one text after the other: (texts, classes)."""
    tokenizer, network = load_tokenizer(model), load_model(model)
    with torch.inference_mode():
        rows = [
            network(**tokenizer(text, truncation=True, max_length=18, return_tensors="pt")).logits[0]
            for text in TEXTS
        ]
    return torch.stack(rows)


def test_accuracy_is_that_of_transformers_own_classification(
    measured: tuple[Evaluated, Path], model: Path
) -> None:
    found, result = measured
    before, after = choices(model), choices(result)
    assert len(set(before)) > 1
    assert found.original.quality["top1_accuracy"] == np.mean(before == CLASSES)
    assert found.result.quality["top1_accuracy"] == np.mean(after == CLASSES)
    comparison = found.comparison
    assert comparison is not None
    assert comparison.top1_agreement == np.mean(before == after)
    assert comparison.accuracy_change is not None
    assert comparison.accuracy_change[0] == pytest.approx(
        np.mean(after == CLASSES) - np.mean(before == CLASSES)
    )
    assert comparison.kl_mean is not None


def test_the_report_says_so_and_the_limit_decides(measured: tuple[Evaluated, Path], model: Path) -> None:
    found, _ = measured
    assert found.text is not None
    assert (found.text.windows, found.text.labelled) == (len(TEXTS), True)
    assert found.comparison is not None
    worse = found.model_copy(
        update={"comparison": found.comparison.model_copy(update={"accuracy_change": (-0.1, -0.2, 0.0)})}
    )
    for allowed, wanted in ((0.11, "accepted"), (0.09, "rejected")):
        (limit,) = limits(Acceptance(max_accuracy_drop=allowed), worse, "classifier")
        assert (limit.measured, verdict((limit,), (), worse)) == (pytest.approx(0.1), wanted)
    report = build_report(
        job_id="job_1",
        model_name="tiny",
        facts=facts_of(model),
        spec=CompressionSpec(steps=(QuantizeWeights(),), acceptance=Acceptance(max_accuracy_drop=1.0)),
        evaluated=found,
        steps=(),
        stage_seconds={},
        device="cpu",
        threads=1,
    )
    page = render_html(report)
    assert "label is the first choice" in page
    assert f"in {len(TEXTS)} texts with labels, at most 16 each" in page


def test_fewer_texts_are_spread_over_the_set_and_keep_their_labels(model: Path, tmp_path: Path) -> None:
    in_order = sorted(LABELS)
    prepared = prepare(model, write_labelled(tmp_path / "set", TEXTS, in_order), tmp_path, texts=6)
    assert prepared.labels == tuple(
        {"calm": 0, "loud": 1, "quick": 2}[in_order[at]] for at in range(0, 24, 4)
    )
    tokenizer = load_tokenizer(model)
    windows = [window.tolist() for window in load_windows(prepared.windows_file)]
    assert windows == [tokenizer(TEXTS[at])["input_ids"] for at in range(0, 24, 4)]


def test_labels_that_are_numbers_stay_and_the_text_reads_as_any_other(model: Path, tmp_path: Path) -> None:
    dataset = write_labelled(tmp_path / "set", ["one\n\nand a half", "two"], [2, 0])
    labels = read_labels(dataset, facts_of(model))
    assert labels is not None
    assert labels.tolist() == [2, 0]
    assert read_documents(dataset) == ["one\nand a half", "two"]
    plain = tmp_path / "plain.txt"
    plain.write_text(read_text(dataset))
    assert read_documents(plain) == read_documents(dataset)
    assert read_labels(plain, facts_of(model)) is None


def test_a_model_without_classes_takes_the_text_alone(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    prepared = prepare(tiny("BertModel"), write_labelled(tmp_path / "set", TEXTS, LABELS), tmp_path)
    assert prepared.labels is None
    assert prepared.text is not None
    assert not prepared.text.labelled


def test_names_that_the_model_does_not_know_are_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no class called 'green'"):
        prepare(model, write_labelled(tmp_path / "set", ["a", "b"], ["calm", "green"]), tmp_path)
