from __future__ import annotations

from xml.etree import ElementTree as ET

from growth_plot import Run, draw


def test_the_picture_has_four_plots_with_a_mark_for_every_run() -> None:
    runs = [
        Run(
            parameters=n * 10**6,
            tokens=n * 1000,
            seconds=n,
            processor_seconds=2.0 * n,
            peak_rss_bytes=n * 2**28,
            planned_bytes=n * 2**28,
        )
        for n in (1, 2, 3)
    ]
    tree = ET.fromstring(draw(runs, runs[:2]))
    svg = "{http://www.w3.org/2000/svg}"
    plots = tree.findall(f"{svg}g/{svg}svg")
    assert [len(plot.findall(f"{svg}circle")) for plot in plots] == [3, 2, 3, 2]
