"""The ranges of values inside an ONNX graph over calibration images, as onnxruntime computes them.

`minmax` spans all that was seen. `mse` counts a histogram in a second pass, and leaves out extreme values where that
lowers the squared error: see calibration/activation_ranges.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from workers.engine.calibration.activation_ranges import BINS, least_error_range
from workers.engine.export.onnx import open_session, save_graph
from workers.engine.export.onnx_images import PIXELS
from workers.engine.export.onnx_qdq import LEVELS

Range = tuple[float, float]
Batches = Callable[[], Iterable[NDArray[np.float32]]]
"""Calibration images, (images, channels, height, width), from the start each time."""


def value_ranges(
    graph: ir.Model, names: Sequence[str], batches: Batches, scratch: Path, *, clips: bool, threads: int
) -> dict[str, Range]:
    """Ends of each value, low ≤ 0 ≤ high; `scratch` is a directory that does not exist yet."""
    save_graph(_watched(graph, names), scratch)
    session = open_session(scratch, threads=threads)
    inputs = {value.name for value in graph.graph.inputs}
    watched = [name for name in names if name not in inputs]

    def seen() -> Iterator[tuple[str, NDArray[np.float32]]]:
        for batch in batches():
            yield from ((name, batch) for name in names if name in inputs)
            yield from zip(watched, session.run(watched, {PIXELS: batch}), strict=True)

    ranges = dict.fromkeys(names, (0.0, 0.0))
    for name, values in seen():
        low, high = ranges[name]
        ranges[name] = min(low, float(values.min())), max(high, float(values.max()))
    return _clipped(ranges, seen) if clips else ranges


def _watched(graph: ir.Model, names: Sequence[str]) -> ir.Model:
    """The same graph with these values among its outputs."""
    watched = graph.clone()
    known = {value.name for value in watched.graph.outputs}
    for node in watched.graph:
        watched.graph.outputs.extend(
            value for value in node.outputs if value.name in names and value.name not in known
        )
    return watched


def _clipped(
    ranges: dict[str, Range], seen: Callable[[], Iterator[tuple[str, NDArray[np.float32]]]]
) -> dict[str, Range]:
    counts: dict[str, Any] = {name: torch.zeros(BINS) for name in ranges}
    for name, values in seen():
        if ranges[name][0] < ranges[name][1]:
            counts[name] += torch.histc(torch.from_numpy(values).float(), BINS, *ranges[name])
    return {
        name: least_error_range(counts[name], *ends, levels=LEVELS) if ends[0] < ends[1] else ends
        for name, ends in ranges.items()
    }
