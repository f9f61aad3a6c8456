from __future__ import annotations

import json
from pathlib import Path

import figures
import pytest
from peers.comparison import Bar


def state_against_peer(kept: figures.Figures, *, ok: bool) -> None:
    kept.add_against_peer(
        "kl", 0.1, "nats", peer="other", peer_version="1.2", peer_value=0.4, floor="ratio < 1", ok=ok
    )


def test_figures_against_a_peer_are_kept_below_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    state_against_peer(figures.Figures("name", model="tiny"), ok=True)
    machine, line = (json.loads(text) for text in (tmp_path / "name.jsonl").read_text().splitlines())
    assert machine["model"] == "tiny"
    assert machine["cores"] >= 1
    assert line == {
        "name": "kl",
        "value": 0.1,
        "unit": "nats",
        "peer": "other",
        "peer_version": "1.2",
        "peer_value": 0.4,
        "ratio": 0.25,
        "floor": "ratio < 1",
        "ok": True,
    }


def test_a_floor_missed_against_a_peer_fails_the_benchmark() -> None:
    kept = figures.Figures()
    state_against_peer(kept, ok=True)
    assert not kept.missed
    state_against_peer(kept, ok=False)
    with pytest.raises(SystemExit) as ended:
        kept.exit()
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("bar", "ours", "met"),
    [
        (Bar(0.5), 1.0, True),
        (Bar(0.5), 1.01, False),
        (Bar(1.0), 2.0, True),
        (Bar(1.0, strict=True), 2.0, False),
        (Bar(1.0, strict=True), 1.99, True),
    ],
)
def test_a_bar_limits_ours_over_theirs(bar: Bar, ours: float, met: bool) -> None:
    assert bar.met(ours, 2.0) is met


def test_a_loss_below_zero_is_beaten_by_a_lower_one_alone() -> None:
    bar = Bar(1.0, strict=True)
    assert bar.met(-0.02, -0.01)
    assert not bar.met(-0.005, -0.01)
