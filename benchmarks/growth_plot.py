"""Draw how the cost of quantizing grows: four small plots in one SVG that stands by itself."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from workers.engine.measure.plots import WIDTH, Point, axis_from_zero, scatter

_HEIGHT = 230
_GAP = 24
# Of the report's page, which these plots are made for; mid-tones that read on a light and on a dark background.
_STYLE = """
text { fill: #6b7785; font: 12px system-ui, sans-serif; }
text.label { font-size: 12.5px; }
.grid { stroke: #8d9aa8; stroke-opacity: .3; }
.axis { stroke: #6b7785; }
.line { fill: none; stroke: #6b7785; stroke-width: 1.4; }
.mark { fill: #2f86e5; }
"""


@dataclass(frozen=True)
class Run:
    """What one quantization took."""

    parameters: int
    """Weights that were quantized."""
    tokens: int
    seconds: float
    processor_seconds: float
    """User and system time, of all threads."""
    peak_rss_bytes: int
    planned_bytes: int
    """What a plan says of the peak."""


def draw(sizes: list[Run], lengths: list[Run]) -> str:
    """Processor time and peak memory, over parameters on the left and over calibration tokens on the right."""
    millions = [run.parameters / 1e6 for run in sizes]
    thousands = [run.tokens / 1e3 for run in lengths]
    left, right = "million weights in linear layers", "thousand calibration tokens"
    panels = [
        _panel(millions, [run.processor_seconds for run in sizes], left, "processor seconds"),
        _panel(thousands, [run.processor_seconds for run in lengths], right, "processor seconds"),
        _panel(millions, [run.peak_rss_bytes / 2**20 for run in sizes], left, "peak memory, MiB"),
        _panel(thousands, [run.peak_rss_bytes / 2**20 for run in lengths], right, "peak memory, MiB"),
    ]
    width, height = 2 * WIDTH + _GAP, 2 * _HEIGHT + _GAP
    placed = Markup("").join(
        Markup('<g transform="translate({} {})">{}</g>').format(
            number % 2 * (WIDTH + _GAP), number // 2 * (_HEIGHT + _GAP), _sized(panel)
        )
        for number, panel in enumerate(panels)
    )
    frame = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"><style>{}</style>{}</svg>\n')
    return str(frame.format(width, height, Markup(_STYLE), placed))


def _panel(x: list[float], y: list[float], x_label: str, y_label: str) -> Markup:
    points = [Point(a, b, 0, f"{a:.4g}: {b:.4g}") for a, b in zip(x, y, strict=True)]
    places = list(zip(x, y, strict=True))
    return scatter(points, axis_from_zero(x, x_label), axis_from_zero(y, y_label), line=places)


def _sized(panel: Markup) -> Markup:
    """A plot within a plot needs its size said."""
    return Markup(str(panel).replace("<svg ", f'<svg width="{WIDTH}" height="{_HEIGHT}" ', 1))
