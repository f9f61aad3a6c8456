from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from made_up import evaluated, model_facts, quantized_step, verification

from app.spec.compression import CompressionSpec
from app.spec.report import SENSITIVITY, Report, TextSample
from workers.engine.measure.plots import Axis, Point, axis_from_zero, scatter, strips
from workers.engine.measure.report import build_report, render_html
from workers.engine.measure.results import Evaluated

FACTS = model_facts()
HOSTILE = "</title><script>alert(1)</script>&\"'"


def report(measured: Evaluated | None = None, **changes: Any) -> Report:
    step = quantized_step(FACTS, curves={"held_out_loss": ((0, 3.0), (20, 2.5))}, warnings=("took long",))
    spec = {"steps": [{"technique": "quantize.weights"}], "acceptance": {"max_bytes_ratio": 0.4}}
    arguments: dict[str, Any] = {
        "job_id": "job_1",
        "model_name": "a model",
        "facts": FACTS,
        "spec": CompressionSpec.model_validate(spec),
        "evaluated": measured or evaluated(),
        "steps": (step,),
        "stage_seconds": {"load": 1.0},
        "device": "cpu",
        "threads": 2,
    }
    return build_report(**(arguments | changes))


class _Tags(HTMLParser):
    """Collects every tag and its attributes, and checks that tags close in order."""

    VOID = ("meta", "br", "circle", "rect", "line", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(page: str) -> _Tags:
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_report_survives_json() -> None:
    written = report()
    assert Report.model_validate_json(written.model_dump_json()) == written
    assert written.verdict == "rejected"
    assert written.coverage.total == 6


def test_sensitivities_of_all_layers_are_one_plot_on_a_scale_of_tens() -> None:
    curves = {
        f"{SENSITIVITY}model.layers.0.self_attn.q_proj": ((0.3, 1e-5), (0.5, 1e-4)),
        f"{SENSITIVITY}model.layers.0.mlp.up_proj": ((0.3, 0.02), (0.5, 0.3), (0.7, 0.0)),
    }
    page = render_html(report(steps=(quantized_step(FACTS, curves=curves),)))
    parse(page)
    assert page.count("Sensitivity: ") == 1
    assert "model.layers.0.mlp.up_proj at 0.5: 0.3 nats a token" in page
    assert "up_proj at 0.7" not in page
    assert "log10 of nats a token" in page


def test_page_is_whole_and_fetches_nothing() -> None:
    page = render_html(report())
    tags = parse(page)
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe"}
    assert not any(key in attributes for _, attributes in tags.seen for key in ("src", "href"))
    assert "url(" not in page
    assert sum(tag == "svg" for tag, _ in tags.seen) == 4


def test_page_says_verdict_flags_and_limits_in_words() -> None:
    page = render_html(report())
    assert "Rejected" in page
    assert "Missed: size of the original, at most 0.40× (measured: 0.51×)." in page
    assert "Built-in text" in page
    assert "took long" in page
    assert "6 of 6 compressible layers" in page


def test_what_came_from_a_user_is_escaped() -> None:
    sample = TextSample(prompt=HOSTILE, original=HOSTILE, result=HOSTILE)
    step = quantized_step(FACTS)
    layer = step.layers[0].model_copy(update={"name": HOSTILE})
    page = render_html(
        report(
            evaluated(verification=verification(samples=(sample,))),
            model_name=HOSTILE,
            steps=(step.model_copy(update={"layers": (layer, *step.layers[1:]), "warnings": (HOSTILE,)}),),
        )
    )
    parse(page)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_page_without_evaluation_says_that_quality_is_unknown() -> None:
    blind = evaluated().model_copy(update={"comparison": None, "text": None})
    bare = {"latency": (), "quality": {}, "peak_memory_bytes": None}
    blind = blind.model_copy(
        update={
            "original": blind.original.model_copy(update=bare),
            "result": blind.result.model_copy(update=bare),
        }
    )
    spec = CompressionSpec.model_validate(
        {"steps": [{"technique": "quantize.weights"}], "evaluation": {"enabled": False}}
    )
    page = render_html(report(blind, spec=spec))
    assert "Unmeasured" in page
    assert "Perplexity" not in page


def test_uploaded_gguf_comes_first() -> None:
    page = render_html(report(facts=FACTS.model_copy(update={"format": "gguf", "dtype": "Q4_1"})))
    assert "the uploaded Q4_1 file" in page


def test_ticks_are_round_and_inside() -> None:
    assert Axis(0, 100, "").ticks(5) == [0, 20, 40, 60, 80, 100]
    for top in (0.003, 0.7, 9.0, 1234.0):
        ticks = axis_from_zero([top], "").ticks()
        assert ticks[0] == 0
        assert 3 <= len(ticks) <= 8
        assert ticks[-1] <= top * 1.06


def test_marks_lie_where_their_numbers_are() -> None:
    axis = Axis(0, 10, "x")
    plot = scatter([Point(0, 0, 0, "low"), Point(10, 10, 0, "high")], axis, axis)
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot)]
    (x0, y0), (x1, y1) = places
    assert x0 < x1
    assert y0 > y1
    rows = strips([("original", [1.0, 1.0], 1.0)], Axis(0, 2, "ms"))
    first, second = re.findall(r'cy="([\d.]+)"', rows)
    assert first != second
