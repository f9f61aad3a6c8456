"""The report as one HTML page: what it shows is decided here, how it looks in report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from app.spec.report import Report
from workers.engine.measure import wording
from workers.engine.measure.figures import figures
from workers.engine.measure.summary import headline, summary_rows


def render(report: Report) -> str:
    """The page; everything that came from a user is escaped by the template engine."""
    page: str = _template().render(
        report=report,
        verdict=wording.verdict(report),
        headline=headline(report),
        rows=summary_rows(report),
        flags=[wording.flag(flag) for flag in report.flags],
        limits=[wording.limit(limit) for limit in report.limits],
        figures=figures(report),
        steps=[_step(index, report) for index in range(len(report.steps))],
        untouched=list(_untouched(report)),
        environment=_environment(report),
        spec_json=json.dumps(report.spec.model_dump(mode="json"), indent=2),
    )
    return page


@cache
def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "bytes": wording.size,
        "seconds": wording.seconds,
        "count": wording.count,
        "value": wording.value,
        "words": wording.words,
    }
    return environment.get_template("report.html")


def _step(index: int, report: Report) -> dict[str, Any]:
    step = report.steps[index]
    actions: dict[str, int] = {}
    for outcome in step.layers:
        actions[outcome.action] = actions.get(outcome.action, 0) + 1
    return {"number": index + 1, "report": step, "actions": actions}


def _untouched(report: Report) -> Iterator[tuple[str, list[str]]]:
    """Untouched layers by their reason."""
    reasons: dict[str, list[str]] = {}
    for outcome in report.coverage.untouched:
        reasons.setdefault(outcome.reason or "no reason given", []).append(outcome.name)
    yield from reasons.items()


def _environment(report: Report) -> list[tuple[str, str]]:
    machine = report.machine
    shown = [(wording.words(name), wording.machine(name, value)) for name, value in machine.items()]
    return [("modelpress", report.modelpress), *shown]
