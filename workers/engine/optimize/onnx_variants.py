"""Write the variants of a graph: as exported, as onnxruntime rewrites it, and in int8. Each is compared with PyTorch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from app.errors import JobFailed
from app.spec.architectures import block_index
from app.spec.base import Family
from app.spec.optimize import OptimizeOnnx
from workers.engine.export.onnx import open_session, rewrite_graph, run, save_graph
from workers.engine.export.onnx_graph import linear_nodes
from workers.engine.export.onnx_int8 import Layout, Quantized, quantize_graph
from workers.engine.optimize.onnx_contest import Probe
from workers.engine.technique import StepContext

# Float32 computed in another order: relative to the largest output.
_FLOAT_TOLERANCE = 1e-3
# Below this mean cosine with PyTorch's outputs, an int8 graph is no longer the same model.
LEAST_COSINE = 0.98
_LAYOUTS: tuple[tuple[str, Layout], ...] = (("int8", "tensor"), ("int8_blocks", "blocks"))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One graph as written, how it agrees with PyTorch, and what became of its weights."""

    name: str
    directory: Path
    bytes: int
    load_ms: float
    difference: float
    """Largest absolute difference over the largest absolute output."""
    cosine: float
    quantized: Mapping[str, Quantized] = field(default_factory=dict)

    @property
    def is_accurate(self) -> bool:
        """Whether it may be kept; a float graph that is not has failed the job already."""
        return not self.quantized or self.cosine >= LEAST_COSINE


class Workshop:
    """Where the variants of one model are made. Their sessions live as long as it does."""

    def __init__(self, graph: ir.Model, probe: Probe, scratch: Path, threads: int) -> None:
        self._graph = graph
        self._probe = probe
        self._scratch = scratch
        self._threads = threads
        self.sessions: dict[str, Any] = {}

    def exported(self) -> Variant:
        """The graph as it is."""
        size = save_graph(self._graph, self._scratch / "exported")
        return self._checked("exported", size)

    def optimized(self, level: str) -> Variant:
        """The exported graph, rewritten by onnxruntime."""
        directories = self._scratch / "exported", self._scratch / "optimized"
        return self._checked("optimized", rewrite_graph(*directories, level, threads=self._threads))

    def int8(self, name: str, layout: Layout, weights: list[str]) -> Variant:
        """The exported graph with the named weights, and the token embedding, in int8."""
        graph = self._graph.clone()
        initializers = self._graph.graph.initializers
        tensors = {weight: initializers[weight].const_value for weight in weights}
        arrays = {weight: tensor.numpy() for weight, tensor in tensors.items() if tensor is not None}
        quantized = quantize_graph(graph, arrays, layout)
        return self._checked(name, save_graph(graph, self._scratch / name), quantized)

    def _checked(self, name: str, size: int, quantized: Mapping[str, Quantized] | None = None) -> Variant:
        directory = self._scratch / name
        started = time.perf_counter()
        session = self.sessions[name] = open_session(directory, threads=self._threads)
        load_ms = (time.perf_counter() - started) * 1e3
        output = run(session, self._probe.checked)
        difference = self._probe.difference(output)
        # Written so that NaN fails too.
        if not quantized and not difference <= _FLOAT_TOLERANCE:
            raise JobFailed(
                f"The {name} ONNX graph does not compute what PyTorch does: the outputs differ by {difference:.2g} of"
                " their largest value.",
                code="onnx_outputs_differ",
                hint="Report this with the model's configuration; quantize.weights works without ONNX.",
            )
        return Variant(
            name=name,
            directory=directory,
            bytes=size,
            load_ms=load_ms,
            difference=difference,
            cosine=self._probe.cosine(output),
            quantized=quantized or {},
        )


def make_variants(
    spec: OptimizeOnnx, shop: Workshop, weights: list[str], context: StepContext
) -> list[Variant]:
    """Write and check every variant that the spec asks for, the exported one first.

    The int8 layout with a scale per block is made only if the faster one changes the outputs too much.
    """
    context.progress(0.55, "writing the graph")
    variants = [shop.exported()]
    context.progress(0.6, "optimizing the graph")
    variants.append(shop.optimized(spec.graph_optimization))
    for name, layout in _LAYOUTS if spec.quantization == "int8_dynamic" else ():
        context.progress(0.65 if layout == "tensor" else 0.7, f"quantizing to {name}")
        variants.append(shop.int8(name, layout, weights))
        if variants[-1].is_accurate:
            break
    return variants


def weights_to_quantize(spec: OptimizeOnnx, graph: ir.Model, context: StepContext) -> list[str]:
    """The linear layers inside blocks, and the language-model head if the spec says so."""
    with_head = spec.quantize_head and context.facts.family == Family.CAUSAL_LM
    return [name for name in linear_nodes(graph.graph) if block_index(name) is not None or with_head]
