"""Draw what pruning trades: four plots in one SVG that stands by itself, from the figures that benchmarks left.

Usage: .venv/bin/python benchmarks/prune_plot.py [--results DIRECTORY] [--out docs/images/prune_tradeoffs.svg]

Above, on stories15m, divergence over sparsity by criterion, weights as they were on the left and fitted on the right.
Below, on SmolLM2-135M at half the weights, divergence over time beside a peer; and on the CIFAR-10 network at half the
multiplications, accuracy by criterion before any training.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Places of each series, by its name."""

_WIDTH, _HEIGHT, _GAP = 440, 270, 24
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 96, 30, 230
_LABEL_HEIGHT = 13
# Of the report's page; mid-tones that read on a light and on a dark background.
_STYLE = """
text { fill: #6b7785; font: 12px system-ui, sans-serif; }
text.title { font-size: 13px; font-weight: 600; }
.grid { stroke: #8d9aa8; stroke-opacity: .3; }
.line { fill: none; stroke-width: 1.6; }
"""
_COLOURS = ("#8d9aa8", "#d9822b", "#2f86e5", "#1f9d6b", "#b05bd6", "#d1495b")
_FRAME = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"><style>{}</style>{}</svg>\n')
_PANEL = Markup('<g transform="translate({} {})">{}</g>')
_TEXT = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_COLOURED = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" style="fill: {}">{}</text>')
_GRID = Markup('<line class="grid" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_LINE = Markup('<polyline class="line" stroke="{}" points="{}"/>')
_DOT = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.2" fill="{}"><title>{}</title></circle>')


@dataclass(frozen=True)
class Scale:
    """An axis with its ticks, linear or logarithmic, between two coordinates."""

    label: str
    ticks: tuple[float, ...]
    start: float
    end: float
    logarithmic: bool = False
    names: tuple[str, ...] = ()
    """What stands at the ticks; without them, their numbers."""

    def place(self, value: float) -> float:
        """The coordinate of a value; the outermost ticks lie at the ends."""
        low, high, value = (
            math.log(v) if self.logarithmic else v for v in (self.ticks[0], self.ticks[-1], value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, default=Path("docs/images/prune_tradeoffs.svg"))
    arguments = parser.parse_args()
    arguments.out.write_text(draw(*read(arguments.results)), encoding="utf-8")


def read(results: Path) -> tuple[Series, Series, Series, Series]:
    """What the four plots show, from the JSON lines in a directory."""
    criteria = _values(results / "prune_criteria_stories15m.jsonl")
    peers = _values(results / "prune_vs_peers_smollm2-135m-degrid_sparse50.jsonl")
    channels = _values(results / "prune_channels_criteria.jsonl")
    alone, fitted = (
        curves(criteria, r"stories15m_([\d.]+)_(\w+)_alone_kl"),
        curves(criteria, r"stories15m_([\d.]+)_((?:(?!_alone)\w)+)_kl"),
    )
    names = [
        m[1] for name in peers if (m := re.fullmatch(r"smollm2-135m-degrid_sparse50_([\w-]+?)_kl", name))
    ]
    stem = "smollm2-135m-degrid_sparse50_"
    against = {
        name: [(peers[f"{stem}{name}_seconds"], peers[f"{stem}{name}_kl"])]
        for name in names
        if "_vs_" not in name
    }
    accuracy = {
        name.partition(",")[0]: [
            (float(number), channels[f"{name.partition(',')[0]}, {how}, untrained: accuracy"])
            for number, how in enumerate(("as cut", "repaired"))
        ]
        for name in channels
        if ", as cut" in name
    }
    return alone, fitted, against, accuracy


def curves(values: Mapping[str, float], pattern: str) -> Series:
    """(sparsity, value) of every name that the pattern matches: its groups are the sparsity and the series."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, value in values.items():
        if match := re.fullmatch(pattern, name):
            found.setdefault(match[2], []).append((float(match[1]), value))
    return {name: sorted(places) for name, places in found.items()}


def draw(alone: Series, fitted: Series, against: Series, accuracy: Series) -> str:
    """Four panels, two by two."""
    right = _WIDTH - _RIGHT
    sparsity = Scale("sparsity", (0.3, 0.4, 0.5, 0.6, 0.7), _LEFT, right)
    nats = Scale("KL in nats", (0.1, 0.3, 1, 3, 10), _BOTTOM, _TOP, logarithmic=True)
    seconds = Scale("seconds, wall", (0, 50, 100, 150, 200), _LEFT, right)
    half = Scale("KL in nats", (0.5, 0.6, 0.7, 0.8, 0.9), _BOTTOM, _TOP)
    repair = Scale("repair, before training", (0, 1), _LEFT + 30, right - 20, names=("as cut", "refitted"))
    right_ones = Scale("accuracy", (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), _BOTTOM, _TOP)
    panels = [
        _panel("stories15m, weights that stay as they were", alone, sparsity, nats),
        _panel("stories15m, weights that stay fitted", fitted, sparsity, nats),
        _panel("SmolLM2-135M, half the weights", against, seconds, half),
        _panel("CIFAR-10 network, half the multiplications", accuracy, repair, right_ones),
    ]
    placed = [
        _PANEL.format(number % 2 * (_WIDTH + _GAP), number // 2 * (_HEIGHT + _GAP), panel)
        for number, panel in enumerate(panels)
    ]
    style = Markup(_STYLE)
    return str(_FRAME.format(2 * _WIDTH + _GAP, 2 * _HEIGHT + _GAP, style, Markup("").join(placed)))


def _panel(title: str, series: Series, x: Scale, y: Scale) -> Markup:
    """Lines with dots, each named at its end; the names are moved apart where they would touch."""
    parts = [_TEXT.format("title", _LEFT, 16, "start", title), *_axes(x, y)]
    ends: list[tuple[float, float, str, str]] = []
    for number, (name, places) in enumerate(series.items()):
        colour, shown = _COLOURS[number % len(_COLOURS)], name.replace("_", " ")
        path = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in places)
        parts.append(_LINE.format(colour, path))
        parts += [
            _DOT.format(x.place(a), y.place(b), colour, f"{shown}: {b:.4g} at {a:.4g}") for a, b in places
        ]
        ends.append((y.place(places[-1][1]), x.place(places[-1][0]), colour, shown))
    ends.sort()
    for height, (_, place, colour, name) in zip(moved_apart([end[0] for end in ends]), ends, strict=True):
        parts.append(_named(place, height, colour, name))
    return Markup("").join(parts)


def _named(place: float, height: float, colour: str, name: str) -> Markup:
    """Beside its dot: what is ours to the left of it, so that a peer's dot to the right is not written over."""
    is_ours = name.startswith("ours")
    return _COLOURED.format(
        place - 8 if is_ours else place + 8, height + 4, "end" if is_ours else "start", colour, name
    )


def moved_apart(heights: Sequence[float]) -> list[float]:
    """The same ascending heights, each at least a label below the one before."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _LABEL_HEIGHT) if placed else height)
    return placed


def _axes(x: Scale, y: Scale) -> list[Markup]:
    parts = []
    for tick in y.ticks:
        height = y.place(tick)
        parts.append(_GRID.format(_LEFT, height, _WIDTH - _RIGHT, height))
        parts.append(_TEXT.format("tick", _LEFT - 6, height + 4, "end", f"{tick:g}"))
    for tick, name in zip(x.ticks, x.names or [f"{tick:g}" for tick in x.ticks], strict=True):
        parts.append(_TEXT.format("tick", x.place(tick), _BOTTOM + 16, "middle", name))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_TEXT.format("label", middle, _BOTTOM + 34, "middle", f"{y.label}, over {x.label}"))
    return parts


def _values(file: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["name"]: line["value"] for line in lines if "name" in line}


if __name__ == "__main__":
    main()
