"""What a job's process may say up its pipe: bounded words, names and numbers, and nothing that JSON does not have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.errors import JobFailed
from workers.events import Failed, StageDone, parse_event

DONE = {"type": "stage_done", "stage": 0, "directory": "00-1"}
READY = {"type": "ready", "seconds": 1.5, "torch": "2.13"}
METRIC = {"type": "metric", "stage": 0, "name": "loss", "value": 1.0}


def line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode()


@pytest.mark.parametrize(
    "event",
    [
        METRIC | {"name": "n" * 201},
        METRIC | {"value": float("nan")},
        READY | {"torch": "t" * 201},
        READY | {"seconds": float("inf")},
        {"type": "stage_started", "stage": 0, "name": "n" * 201},
        {"type": "warning", "message": "w" * 2001},
        {"type": "failed", "code": "c" * 201, "detail": "d"},
        {"type": "failed", "code": "c", "detail": "d", "stage": "s" * 201},
        DONE | {"metrics": {"n" * 201: 1}},
        DONE | {"metrics": {"n": "w" * 501}},
        DONE | {"metrics": {"n": [1]}},
        DONE | {"metrics": {str(n): n for n in range(201)}},
    ],
)
def test_what_has_no_end_or_no_place_in_json_is_no_event(event: dict[str, Any]) -> None:
    with pytest.raises(JobFailed) as caught:
        parse_event(line(event))
    assert caught.value.code == "protocol"


def test_metrics_come_as_they_are() -> None:
    metrics = {"seconds": 1.5, "bytes": 3, "kept": "int8", "stopped": True, "gap": None}
    event = parse_event(line(DONE | {"metrics": metrics | {"loss": float("nan")}}))
    assert isinstance(event, StageDone)
    assert event.metrics == metrics | {"loss": None}
    assert StageDone.model_validate(DONE | {"metrics": {"loss": float("inf")}}).metrics == {"loss": None}


def test_why_a_job_failed_is_cut_and_not_lost() -> None:
    event = parse_event(line({"type": "failed", "code": "c", "detail": "d" * 9000, "hint": "h" * 9000}))
    assert isinstance(event, Failed)
    assert (len(event.detail), len(event.hint or "")) == (4000, 4000)
