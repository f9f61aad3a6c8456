"""Small SVG plots for the report: pure functions from numbers to markup, coloured by the page's style sheet.

Widths are those of a phone's column, so that labels stay readable there; wider screens scale them up a little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 14, 38
# Room for the names of rows.
_NAMES = 78
# Markup.format escapes what it fills in.
_SVG = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
_LINE = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_TEXT = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_PART = Markup('<rect class="part c{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')


@dataclass(frozen=True)
class Point:
    """A mark at (x, y) of a series, with what a pointer resting on it reads."""

    x: float
    y: float
    series: int
    title: str


@dataclass(frozen=True)
class Axis:
    """A linear axis from low to high, in the units of its label."""

    low: float
    high: float
    label: str

    def ticks(self, count: int = 5) -> list[float]:
        """Round values from low to high, about `count` of them."""
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def place(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two coordinates."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def axis_from_zero(values: Sequence[float], label: str) -> Axis:
    """An axis from zero to just above the largest value."""
    top = max(values, default=0.0)
    return Axis(0.0, top * 1.06 if top > 0 else 1.0, label)


def scatter(points: Sequence[Point], x: Axis, y: Axis, *, line: Sequence[tuple[float, float]] = ()) -> Markup:
    """Points over two axes, with an optional line through given places."""
    height = 230
    frame = _Frame(x, y, height)
    marks = [frame.grid()]
    if line:
        path = " ".join(f"{frame.px(a):.1f},{frame.py(b):.1f}" for a, b in line)
        marks.append(Markup('<polyline class="line" points="{}"/>').format(path))
    marks += [_mark(p.series, frame.px(p.x), frame.py(p.y), p.title) for p in points]
    return _svg(height, f"{y.label} over {x.label}", marks)


def strips(rows: Sequence[tuple[str, Sequence[float], float]], axis: Axis) -> Markup:
    """One row of dots for each (name, samples, median), over a shared axis; a bar marks the median.

    The first row, what the others are compared with, has a colour and shape of its own.
    """
    row_height, top = 44, 6
    height = top + row_height * len(rows) + 34
    left = _NAMES
    right, bottom = WIDTH - _RIGHT, height - 34
    marks: list[Markup] = []
    for tick in axis.ticks():
        x = axis.place(tick, left, right)
        marks.append(_line("grid", x, top, x, bottom))
        marks.append(_text(x, bottom + 14, _number(tick), "middle"))
    marks.append(_text((left + right) / 2, height - 3, axis.label, "middle", "label"))
    for index, (name, samples, median) in enumerate(rows):
        middle, series = top + row_height * (index + 0.5), min(index, 1)
        marks.append(_text(left - 8, middle + 4, name, "end"))
        for number, sample in enumerate(samples):
            # Neighbouring samples are set apart so that equal ones do not hide each other.
            y = middle + (number % 5 - 2) * 4.5
            title = f"{name}: {_number(sample)} {axis.label}"
            marks.append(_mark(series, axis.place(sample, left, right), y, title))
        x = axis.place(median, left, right)
        marks.append(_line(f"median s{series}", x, middle - 16, x, middle + 16))
    return _svg(height, "Samples and medians", marks)


def stacked_bars(bars: Sequence[tuple[str, Sequence[tuple[int, float, str]]]], axis: Axis) -> Markup:
    """Horizontal bars of (name, parts); a part is (colour number, length, what a pointer reads)."""
    bar_height, gap, left = 34, 14, _NAMES
    height = len(bars) * (bar_height + gap) + 40
    right, bottom = WIDTH - _RIGHT, height - 36
    marks: list[Markup] = []
    for tick in axis.ticks():
        x = axis.place(tick, left, right)
        marks.append(_line("grid", x, 2, x, bottom))
        marks.append(_text(x, bottom + 14, _number(tick), "middle"))
    marks.append(_text((left + right) / 2, height - 4, axis.label, "middle", "label"))
    for index, (name, parts) in enumerate(bars):
        top = 4 + index * (bar_height + gap)
        marks.append(_text(left - 8, top + bar_height / 2 + 4, name, "end"))
        start = 0.0
        for colour, length, title in parts:
            x0, x1 = axis.place(start, left, right), axis.place(start + length, left, right)
            marks.append(_PART.format(colour, x0, top, max(0.5, x1 - x0), bar_height, title))
            start += length
    return _svg(height, "Size by component", marks)


class _Frame:
    """The plotting area of a scatter plot."""

    def __init__(self, x: Axis, y: Axis, height: int) -> None:
        """Lay out two axes on a plot of a height."""
        self._x, self._y = x, y
        self._bottom = height - _BOTTOM

    def px(self, value: float) -> float:
        """Horizontal coordinate of a value."""
        return self._x.place(value, _LEFT, WIDTH - _RIGHT)

    def py(self, value: float) -> float:
        """Vertical coordinate of a value."""
        return self._y.place(value, self._bottom, _TOP)

    def grid(self) -> Markup:
        """Grid lines, ticks and labels."""
        parts: list[Markup] = []
        for tick in self._y.ticks(4):
            y = self.py(tick)
            parts.append(_line("grid", _LEFT, y, WIDTH - _RIGHT, y))
            parts.append(_text(_LEFT - 6, y + 4, _number(tick), "end"))
        ticks = self._x.ticks(6)
        parts += [_text(self.px(tick), self._bottom + 15, _number(tick), "middle") for tick in ticks]
        parts.append(_line("axis", _LEFT, self._bottom, WIDTH - _RIGHT, self._bottom))
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(_text(middle, self._bottom + 33, self._x.label, "middle", "label"))
        turned = Markup(
            '<text class="label" text-anchor="middle" transform="translate(11 {:.0f}) rotate(-90)">{}</text>'
        )
        parts.append(turned.format((_TOP + self._bottom) / 2, self._y.label))
        return Markup("").join(parts)


def _mark(series: int, x: float, y: float, title: str) -> Markup:
    """A dot; every series has a shape of its own, so that colour is not needed to tell them apart."""
    if series % 2 == 0:
        shape = Markup('<circle class="mark s{}" cx="{:.1f}" cy="{:.1f}" r="3.4"><title>{}</title></circle>')
        return shape.format(series, x, y, title)
    shape = Markup(
        '<rect class="mark s{}" x="{:.1f}" y="{:.1f}" width="6.2" height="6.2"><title>{}</title></rect>'
    )
    return shape.format(series, x - 3.1, y - 3.1, title)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return _LINE.format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> Markup:
    return _TEXT.format(kind, x, y, anchor, words)


def _svg(height: int, label: str, marks: Sequence[Markup]) -> Markup:
    return _SVG.format(WIDTH, height, label, Markup("").join(marks))


def _round_step(rough: float) -> float:
    """Near a rough step, the first of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= 0.8 * rough)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
