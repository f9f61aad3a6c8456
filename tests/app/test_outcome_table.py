"""The table of what was gained and lost, as text."""

from __future__ import annotations

import io
from pathlib import Path

from reports import measured, report
from rich.console import Console

from app.demo.jobs import FIRST, SECOND
from app.terminal import Outcome, _visible_files, outcome_table


def lines(*outcomes: Outcome) -> list[list[str]]:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(outcome_table(outcomes))
    text = captured.get().splitlines()
    assert max(map(len, text)) <= 80
    return [line.split() for line in text]


def test_before_after_and_ratio_stand_below_each_other() -> None:
    before, after = (
        measured(273_000_000, 1234.56, perplexity=44.23),
        measured(120_000_000, 600, perplexity=2344.57),
    )
    shown = lines(
        Outcome("SmolLM2 2:4 sparse", {}, report(before, after, perplexity_ratio=53.01, latency_ratio=0.486))
    )
    assert ["SmolLM2", "before", "273", "16.00", "ppl", "44.23", "1234.6", "1178", "rejected"] in shown
    assert any(line[:6] == ["2:4", "after", "120", "16.00", "2344.57", "600.0"] for line in shown)
    assert any(line[:6] == ["sparse", "ratio", "×0.440", "×1.000", "×53.010", "×0.486"] for line in shown)
    assert sum("no_speedup" in line for line in shown) == 1


def test_flags_stay_whole_beside_the_longest_names_and_figures() -> None:
    before, after = (
        measured(273_000_000, 1234.56, perplexity=44.23),
        measured(251_000_000, 600, perplexity=2344.57),
    )
    compared = report(before, after, perplexity_ratio=53.01, latency_ratio=0.486)
    shown = lines(*(Outcome(job.label, {}, compared) for job in (*FIRST, *SECOND)))
    assert sum("larger_than_original" in line for line in shown) == len((*FIRST, *SECOND))


def test_an_encoder_shows_the_mean_and_the_least_cosine() -> None:
    before, after = measured(92_000_000, 40), measured(24_000_000, 10)
    shown = lines(Outcome("MiniLM onnx", {}, report(before, after, cosine_mean=0.9926, cosine_min=0.986)))
    words = [word for line in shown for word in line]
    assert {"cosine", "0.9926", "0.9860"} <= set(words)


def test_a_failed_job_says_why() -> None:
    job = {"status": "failed", "error": {"detail": "out of memory"}}
    words = [word for line in lines(Outcome("MiniLM onnx", job, None)) for word in line]
    assert "failed" in words
    assert "memory" in words


def test_a_directory_is_its_visible_files_links_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"tokens")
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / ".cache").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / ".cache" / "secret").write_text("x")
    (model / "empty").touch()
    (model / "tokenizer.json").symlink_to(tmp_path / "blob")
    assert [path.relative_to(model).as_posix() for path in _visible_files(model)] == [
        "1_Pooling/config.json",
        "tokenizer.json",
    ]
