from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import prune_plot
import pytest

RESULTS = Path(prune_plot.__file__).parent / "results"
SVG = "{http://www.w3.org/2000/svg}"


def test_every_figure_that_was_kept_is_a_dot_and_every_series_has_a_name() -> None:
    shown = prune_plot.read(RESULTS)
    tree = ET.fromstring(prune_plot.draw(*shown))
    panels = tree.findall(f"{SVG}g")
    assert [len(panel.findall(f"{SVG}circle")) for panel in panels] == [9, 15, 5, 12]
    for panel, series in zip(panels, shown, strict=True):
        words = {text.text for text in panel.findall(f"{SVG}text")}
        assert {name.replace("_", " ") for name in series} <= words


def test_the_picture_of_the_docs_is_that_of_the_results() -> None:
    picture = RESULTS.parents[1] / "docs" / "images" / "prune_tradeoffs.svg"
    assert picture.read_text() == prune_plot.draw(*prune_plot.read(RESULTS))


def test_axes_have_their_outermost_ticks_at_the_ends() -> None:
    scale = prune_plot.Scale("nats", (0.1, 1, 10), 200, 0, logarithmic=True)
    assert [scale.place(tick) for tick in scale.ticks] == pytest.approx([200, 100, 0])


def test_names_are_moved_apart() -> None:
    assert prune_plot.moved_apart([10, 12, 60]) == [10, 23, 60]
