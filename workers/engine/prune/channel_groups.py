"""Follow the channels of a network through its calls, to find what goes together (see channel_layout)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.engine.onnx_network import Call, Network
from workers.engine.prune.channel_layout import Axis, Channels, Layer, Layout, Spaces

_BY_CHANNEL = frozenset(
    {
        "AveragePool", "Clip", "Dropout", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool",
        "Relu", "Sigmoid", "Squeeze", "Tanh", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that do the same to every channel, whatever is in the others."""


def find_channels(network: Network) -> Channels:
    """The spaces of channels of a network, by a pass over one empty image."""
    shapes: dict[str, torch.Size] = {network.signature.source: torch.Size((1, *network.signature.image))}

    def note(call: Call, _inputs: Sequence[Tensor | None], output: Tensor) -> None:
        shapes[call.output] = output.shape

    with torch.no_grad():
        network.eval()(torch.zeros(1, *network.signature.image), note)
    return _Tracer(network, shapes).channels()


class _Tracer:
    """Layouts of values, axes and layers, as the calls are gone through."""

    def __init__(self, network: Network, shapes: dict[str, torch.Size]) -> None:
        self._network = network
        self._shapes = shapes
        self._spaces = Spaces()
        self._axes: list[Axis] = []
        self._layers: list[Layer] = []
        source = network.signature.source
        self._layouts: dict[str, Layout] = {source: self._spaces.new(shapes[source][1])}
        self._spaces.keep(self._layouts[source])

    def channels(self) -> Channels:
        """Go through all calls."""
        for call in self._network.calls:
            self._layouts[call.output] = self._output(call)
        self._spaces.keep(self._layouts[self._network.signature.result])
        self._keep_shared()
        return Channels(
            sizes=self._spaces.sizes(),
            free=self._spaces.free(),
            axes=tuple(Axis(a.array, a.axis, self._spaces.resolved(a.layout), a.role) for a in self._axes),
            layers=tuple(
                Layer(
                    layer.call,
                    layer.places,
                    None if layer.reads is None else self._spaces.resolved(layer.reads),
                    self._spaces.resolved(layer.writes),
                    layer.fixed,
                )
                for layer in self._layers
            ),
            layouts={name: self._spaces.resolved(layout) for name, layout in self._layouts.items()},
        )

    def _output(self, call: Call) -> Layout:
        rules: dict[str, Callable[[Call], Layout | None]] = {
            "Conv": self._convolution,
            "Gemm": self._linear,
            "MatMul": self._linear,
            "BatchNormalization": self._norm,
            "Concat": self._concatenation,
            "Flatten": self._flattening,
            "ReduceMean": self._mean,
            "Pad": self._same_channels,
            **dict.fromkeys(_BY_CHANNEL, self._same_channels),
        }
        rule = rules.get(call.operator) if call.inputs and call.inputs[0] in self._layouts else None
        if call.operator in ("Add", "Sub", "Mul", "Div"):
            # Either of the two may be a constant.
            rule = self._arithmetic
        found = None if rule is None else rule(call)
        if found is not None and self._spaces.size(found) == self._channel_count(call.output):
            return found
        return self._not_understood(call)

    def _not_understood(self, call: Call) -> Layout:
        self._spaces.keep(*(self._layouts[name] for name in self._computed(call)))
        layout = self._spaces.new(self._channel_count(call.output))
        self._spaces.keep(layout)
        return layout

    def _channel_count(self, value: str) -> int:
        shape = self._shapes[value]
        return shape[1] if len(shape) > 1 else 1

    def _computed(self, call: Call) -> list[str]:
        return [name for name in call.inputs if name in self._layouts]

    def _belongs(self, array: str | None, axis: int, layout: Layout, role: str = "follows") -> None:
        if array is not None:
            self._axes.append(Axis(array, axis, layout, role))

    def _convolution(self, call: Call) -> Layout | None:
        weight = call.weight
        if weight is None or not self._network.has_array(weight):
            return None
        shape, group = self._network.array(weight).shape, call.attributes.get("group", 1)
        reads = self._layouts[call.inputs[0] or ""]
        places = math.prod(self._shapes[call.output][2:]) * math.prod(shape[2:])
        if group == 1:
            writes = self._spaces.new(shape[0])
            self._belongs(weight, 1, reads, "reads")
            self._layers.append(Layer(call, places, reads, writes))
        elif group == shape[0] == self._spaces.size(reads):
            writes = reads
            self._layers.append(Layer(call, places, None, writes))
        else:
            self._layers.append(Layer(call, 0, (), (), fixed=places * shape[0] * shape[1]))
            return None
        self._belongs(weight, 0, writes, "writes")
        self._belongs(call.bias, 0, writes)
        return writes

    def _linear(self, call: Call) -> Layout | None:
        weight = call.weight
        is_plain = (
            weight is not None and self._network.has_array(weight) and not call.attributes.get("transA")
        )
        if weight is None or not is_plain or len(self._shapes[call.inputs[0] or ""]) != 2:
            return None
        outputs_first = bool(call.attributes.get("transB"))
        reads = self._layouts[call.inputs[0] or ""]
        writes = self._spaces.new(self._network.array(weight).shape[0 if outputs_first else 1])
        self._belongs(weight, 1 if outputs_first else 0, reads, "reads")
        self._belongs(weight, 0 if outputs_first else 1, writes, "writes")
        self._layers.append(Layer(call, 1, reads, writes))
        if call.bias is not None:
            self._follow_constant(call.bias, writes, rank=2)
        return writes

    def _norm(self, call: Call) -> Layout | None:
        if not all(self._network.has_array(name) for name in call.inputs[1:]):
            return None
        layout = self._layouts[call.inputs[0] or ""]
        self._belongs(call.inputs[1], 0, layout, "norm_scale")
        for vector in call.inputs[2:]:
            self._belongs(vector, 0, layout)
        return layout

    def _same_channels(self, call: Call) -> Layout | None:
        before, after = self._shapes[call.inputs[0] or ""], self._shapes[call.output]
        return self._layouts[call.inputs[0] or ""] if before[:2] == after[:2] else None

    def _mean(self, call: Call) -> Layout | None:
        given = call.inputs[1] if len(call.inputs) > 1 else None
        axes = self._network.array(given).tolist() if given else call.attributes.get("axes", ())
        rank = len(self._shapes[call.inputs[0] or ""])
        over = {axis % rank for axis in axes}
        return self._same_channels(call) if over and not over & {0, 1} else None

    def _flattening(self, call: Call) -> Layout | None:
        shape = self._shapes[call.inputs[0] or ""]
        if call.attributes.get("axis", 1) != 1:
            return None
        places = math.prod(shape[2:])
        return tuple(type(s)(s.space, s.repeat * places) for s in self._layouts[call.inputs[0] or ""])

    def _concatenation(self, call: Call) -> Layout | None:
        layouts = [self._layouts[name] for name in self._computed(call)]
        rank = len(self._shapes[call.output])
        if len(layouts) != len(call.inputs) or rank < 2:
            return None
        if call.attributes["axis"] % rank == 1:
            return tuple(segment for layout in layouts for segment in layout)
        for other in layouts[1:]:
            self._spaces.merge(layouts[0], other)
        return layouts[0]

    def _arithmetic(self, call: Call) -> Layout | None:
        """Of two values, or of a value and a constant; a single channel goes with all of the other's."""
        rank, count = len(self._shapes[call.output]), self._channel_count(call.output)
        computed = self._computed(call)
        if not computed or rank < 2 or any(len(self._shapes[name]) != rank for name in computed):
            return None
        full = [self._layouts[name] for name in computed if self._channel_count(name) == count]
        self._spaces.keep(*(self._layouts[name] for name in computed if self._channel_count(name) != count))
        for other in full[1:]:
            self._spaces.merge(full[0], other)
        for name in call.inputs:
            if self._network.has_array(name) and full:
                self._follow_constant(name or "", full[0], rank=rank)
        return full[0] if full else None

    def _follow_constant(self, name: str, layout: Layout, *, rank: int) -> None:
        """A constant that has a number for each channel loses those that go."""
        array = self._network.array(name)
        axis = array.dim() - rank + 1
        if axis >= 0 and array.shape[axis] > 1:
            self._belongs(name, axis, layout)

    def _keep_shared(self) -> None:
        """Tensors that several calls read belong to channels of all of them."""
        uses = Counter(name for call in self._network.calls for name in set(call.inputs) if name)
        self._spaces.keep(*(axis.layout for axis in self._axes if uses[axis.array] > 1))
