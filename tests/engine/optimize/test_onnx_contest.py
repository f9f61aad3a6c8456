from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from tiny_models import facts_of, tiny_model

from workers.engine.architectures.loading import load_model
from workers.engine.optimize.onnx_contest import Probe, contest, make_probe, speed_ratio
from workers.engine.technique import StepContext


def _probe(reference: np.ndarray, *, centred: bool = False) -> Probe:
    mask = np.ones(reference.shape[:2], dtype=np.int64)
    mask[-1, 2:] = 0
    return Probe(
        checked={"attention_mask": mask}, timed={}, reference=reference, centred=centred, is_text=True
    )


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)


def test_what_stands_at_padding_is_not_compared(reference: np.ndarray) -> None:
    output = reference.copy()
    output[-1, 2:] = 1e6
    assert _probe(reference).difference(output) == 0
    assert _probe(reference).cosine(output) == pytest.approx(1)
    output[-1, 1] += 0.5
    assert _probe(reference).difference(output) > 0.1
    assert _probe(reference).cosine(output) < 0.999


def test_a_constant_added_to_all_logits_of_a_token_changes_nothing(reference: np.ndarray) -> None:
    assert _probe(reference, centred=True).cosine(reference + 100) == pytest.approx(1, abs=1e-4)
    assert _probe(reference, centred=True).cosine(100 - reference) == pytest.approx(-1, abs=1e-4)


def test_outputs_that_are_not_numbers_agree_with_nothing(reference: np.ndarray) -> None:
    assert not _probe(reference).difference(reference * np.nan) <= 1
    assert not _probe(reference).cosine(reference * np.nan) >= 0


def test_runners_take_turns_and_each_has_as_many_times_as_the_others() -> None:
    turns: list[str] = []
    shares: list[float] = []
    times = contest({name: lambda name=name: turns.append(name) for name in "abc"}, shares.append)
    assert [name for name, _ in groupby(turns)] == list("abc") * (len(turns) // 3)
    assert {len(samples) for samples in times.values()} == {len(turns) // 3 - 2}
    assert shares == sorted(shares)
    assert shares[-1] <= 1


def test_a_slow_round_for_all_does_not_change_the_ratio() -> None:
    assert speed_ratio((10.0, 100.0, 10.0), (20.0, 200.0, 20.0)) == 0.5
    assert speed_ratio((10.0, 1000.0, 10.0), (20.0, 20.0, 20.0)) == 0.5


def _context(source: Path, target: Path) -> StepContext:
    return StepContext(source=source, target=target, original=source, facts=facts_of(source), threads=1)


def test_probe_takes_real_text_and_has_padding(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("BertModel")
    names = ["input_ids", "attention_mask"]
    probe = make_probe(load_model(source), names, _context(source, tmp_path))
    assert probe.is_text
    assert probe.checked["input_ids"].shape == (4, 64)
    assert probe.timed["input_ids"].shape == (1, 128)
    assert (probe.checked["attention_mask"].sum(axis=1) == [64, 64, 64, 32]).all()
    assert set(probe.timed) == set(names)


def test_probe_of_a_model_without_a_tokenizer_takes_random_tokens_within_its_reach(tmp_path: Path) -> None:
    source = tiny_model("RobertaModel", tmp_path / "source", max_position_embeddings=40)
    for file in source.glob("tokenizer*"):
        file.unlink()
    probe = make_probe(load_model(source), ["input_ids", "attention_mask"], _context(source, tmp_path))
    assert not probe.is_text
    assert probe.timed["input_ids"].shape == (1, 38)
    assert len(np.unique(probe.timed["input_ids"])) > 20
