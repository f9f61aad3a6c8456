"""The network as a module: its calls in order, the tensors they work on, and which of those are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from workers.engine.onnx_network.operators import OPERATORS

Observe = Callable[["Call", tuple[Tensor | None, ...], Tensor], None]
_TRAINED = {"Conv": (1, 2), "Gemm": (1, 2), "MatMul": (1,), "BatchNormalization": (1, 2)}
"""Which inputs of an operator are weights."""


@dataclass(frozen=True)
class Call:
    """One operator at work: names of the values it reads and of the one it gives."""

    operator: str
    name: str
    inputs: tuple[str | None, ...]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> str | None:
        """The name of the weight of a convolution or of a linear layer; None for other operators."""
        return self.inputs[1] if self.operator in ("Conv", "Gemm", "MatMul") else None

    @property
    def bias(self) -> str | None:
        """The name of its bias; None where there is none."""
        has_bias = self.operator in ("Conv", "Gemm") and len(self.inputs) > 2
        return self.inputs[2] if has_bias else None


@dataclass(frozen=True)
class Signature:
    """What a network takes and gives, and in which version of ONNX's operators its calls are meant."""

    source: str
    """Name of the input."""
    image: tuple[int, int, int]
    """Channels, height and width of an image."""
    result: str
    """Name of the output: (images, classes)."""
    opset: int


class Network(nn.Module):
    """Runs calls one after the other. Tensors are kept by their names in the graph, which torch does not allow for attributes.

    In training mode batch norms use the statistics of the batch, and update theirs.
    """

    def __init__(self, calls: list[Call], arrays: dict[str, Tensor], signature: Signature) -> None:
        """`arrays` are the constants of the graph by name."""
        super().__init__()
        self.calls = calls
        self.signature = signature
        self._attributes: dict[str, str] = {}
        trained = _trained(calls, arrays)
        for number, (name, array) in enumerate(arrays.items()):
            self._attributes[name] = attribute = f"array{number}"
            if name in trained:
                self.register_parameter(attribute, nn.Parameter(array))
            else:
                self.register_buffer(attribute, array)
        self._done_with = _last_uses(calls, kept={signature.result, *arrays})

    def array(self, name: str) -> Tensor:
        """A constant of the graph by its name: a parameter, or a buffer."""
        return getattr(self, self._attributes[name])  # type: ignore[no-any-return]

    def has_array(self, name: str | None) -> bool:
        """Whether a name is that of a constant, and not of something computed."""
        return name in self._attributes

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of all constants."""
        return tuple(self._attributes)

    def set_array(self, name: str, array: Tensor) -> None:
        """Put another tensor in the place of a constant; it may have another shape."""
        attribute, array = self._attributes[name], array.detach().contiguous()
        setattr(self, attribute, nn.Parameter(array) if attribute in self._parameters else array)

    def forward(self, images: Tensor, observe: Observe | None = None) -> Tensor:
        """Logits: (images, channels, height, width) -> (images, classes). `observe` is shown every call as it is made."""
        values: dict[str | None, Tensor] = {self.signature.source: images}
        for call, done_with in zip(self.calls, self._done_with, strict=True):
            inputs = tuple(
                self.array(name) if name in self._attributes else values[name] if name else None
                for name in call.inputs
            )
            extra = {"training_mode": 1} if self.training and call.operator == "BatchNormalization" else {}
            result = OPERATORS[call.operator](*inputs, **call.attributes | extra)
            if observe is not None:
                observe(call, inputs, result)
            values[call.output] = result
            for name in done_with:
                del values[name]
        return values[self.signature.result]


def _trained(calls: list[Call], arrays: dict[str, Tensor]) -> set[str]:
    """Names of weights and biases; what is added to a product is its bias."""
    products = {call.output for call in calls if call.operator == "MatMul"}
    names = {
        call.inputs[at] for call in calls for at in _TRAINED.get(call.operator, ()) if at < len(call.inputs)
    }
    for call in calls:
        if call.operator == "Add" and products.intersection(call.inputs):
            names.update(call.inputs)
    return {name for name in names if name in arrays and arrays[name].is_floating_point()}


def _last_uses(calls: list[Call], kept: set[str]) -> list[tuple[str, ...]]:
    """For each call, the values that nothing after it reads."""
    last: dict[str, int] = {}
    for number, call in enumerate(calls):
        last[call.output] = number
        last.update({name: number for name in call.inputs if name})
    return [
        tuple(
            name
            for name in dict.fromkeys((*call.inputs, call.output))
            if name and last[name] == number and name not in kept
        )
        for number, call in enumerate(calls)
    ]
