"""What an ONNX file says of its graph, read without touching a weight: the fields of onnx.proto that are asked for.

Protocol buffers are pairs of a field's number and its value; values of no interest are skipped by their length. Limits are
those of files that exist: nothing here grows with what a file claims, only with what it holds.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.intake.refusals import refused
from app.spec.facts import TensorFact

_MAX_BYTES = 2**31
"""Protocol buffers end there."""
_MAX_NODES = 100_000
_MAX_TENSORS = 100_000
_MAX_FIELDS = 5_000_000
"""Read of one file, all in all: seconds."""
_MAX_NAME = 1000
_MAX_EDGE, _MAX_RANK = 2**40, 8
_EMPTY = memoryview(b"")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2",
}  # fmt: skip
"""TensorProto.DataType in safetensors' spelling."""

Value = int | memoryview
Dimension = int | None
"""None where it may be any."""


@dataclass(frozen=True)
class OnnxNode:
    """One operator of a graph."""

    operator: str
    domain: str
    inputs: tuple[str, ...]
    holds_graph: bool
    """Whether an attribute of it is a graph."""


@dataclass(frozen=True)
class OnnxHeader:
    """A graph without its weights."""

    opset: int
    """Of the standard operators."""
    nodes: tuple[OnnxNode, ...]
    tensors: tuple[TensorFact, ...]
    external: tuple[str, ...]
    """Names of tensors whose numbers are in another file."""
    inputs: dict[str, tuple[Dimension, ...]]
    """Shapes, by name; those of weights are not among them."""
    outputs: dict[str, tuple[Dimension, ...]]
    has_functions: bool


def read_onnx(path: Path, name: str) -> OnnxHeader:
    """Read a ModelProto. Raises IntakeError (`header_invalid`, `truncated`, `unsupported_dtype`)."""
    size = path.stat().st_size
    if not 0 < size <= _MAX_BYTES:
        raise _invalid(name, f"it has {size} bytes")
    with path.open("rb") as file:
        # Closed with the last view of it, which an error's traceback may hold.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return _Reader().model(view)
    except (ValueError, IndexError) as error:
        raise _invalid(name, str(error)) from None


class _Reader:
    """Reads one file, and no more fields of it than any network has: a field may be two bytes, and a file 2 GiB."""

    def __init__(self) -> None:
        self._fields_left = _MAX_FIELDS

    def model(self, view: memoryview) -> OnnxHeader:
        graph, opset, has_functions = None, 0, False
        for number, value in self._fields(view):
            if number == 7:
                graph = _message(value)
            elif number == 8:
                fields = dict(self._fields(_message(value)))
                if _text(fields.get(1, _EMPTY)) in ("", "ai.onnx"):
                    opset = _number(fields.get(2, 0))
            elif number == 25:
                has_functions = True
        if graph is None or opset == 0:
            raise ValueError("it holds no graph of ONNX's operators")
        return self._graph(graph, opset, has_functions=has_functions)

    def _graph(self, view: memoryview, opset: int, *, has_functions: bool) -> OnnxHeader:
        nodes: list[OnnxNode] = []
        tensors: list[tuple[TensorFact, bool]] = []
        inputs: dict[str, tuple[Dimension, ...]] = {}
        outputs: dict[str, tuple[Dimension, ...]] = {}
        for number, value in self._fields(view):
            if number == 1:
                nodes.append(self._node(_message(value)))
            elif number == 5:
                tensors.append(self._tensor(_message(value)))
            elif number in (11, 12):
                name, shape = self._value_info(_message(value))
                (inputs if number == 11 else outputs)[name] = shape
            elif number == 15:
                raise ValueError("it has sparse tensors")
            if len(nodes) > _MAX_NODES or max(map(len, (tensors, inputs, outputs))) > _MAX_TENSORS:
                raise ValueError("it has more nodes or tensors than any network")
        names = {tensor.name for tensor, _ in tensors}
        if len(names) != len(tensors):
            raise ValueError("two of its tensors have one name")
        return OnnxHeader(
            opset=opset,
            nodes=tuple(nodes),
            tensors=tuple(tensor for tensor, _ in tensors),
            external=tuple(tensor.name for tensor, is_external in tensors if is_external),
            inputs={name: shape for name, shape in inputs.items() if name not in names},
            outputs=outputs,
            has_functions=has_functions,
        )

    def _node(self, view: memoryview) -> OnnxNode:
        inputs: list[str] = []
        operator = domain = ""
        holds_graph = False
        for number, value in self._fields(view):
            if number == 1:
                inputs.append(_text(value))
            elif number == 4:
                operator = _text(value)
            elif number == 5:
                holds_graph |= self._attribute(_message(value))
            elif number == 7:
                domain = _text(value)
        return OnnxNode(operator, domain, tuple(inputs), holds_graph)

    def _attribute(self, view: memoryview) -> bool:
        """Whether it is a graph. Raises ValueError where it is a tensor whose numbers are elsewhere."""
        holds_graph = False
        for number, value in self._fields(view):
            if number in (5, 10):
                found = dict(self._fields(_message(value)))
                if _is_external(found):
                    raise ValueError("a constant of it keeps its numbers in another file")
            holds_graph |= number in (6, 11)
        return holds_graph

    def _tensor(self, view: memoryview) -> tuple[TensorFact, bool]:
        """A tensor's name, dtype and shape, and whether its numbers are elsewhere."""
        shape: list[int] = []
        found: dict[int, Value] = {}
        for number, value in self._fields(view):
            if number == 1:
                shape += [value] if isinstance(value, int) else list(_varints(value))
            else:
                found[number] = value
        name, dtype = _text(found.get(8, _EMPTY)), _number(found.get(2, 0))
        if dtype not in _DTYPES:
            raise refused("unsupported_dtype", f"{name[:100]} is of ONNX's type {dtype}.")
        if any(size >= _MAX_EDGE for size in shape) or len(shape) > _MAX_RANK:
            raise ValueError(f"{name[:100]} is said to be of shape {shape[:_MAX_RANK]}")
        fact = TensorFact(name=name, dtype=_DTYPES[dtype], shape=tuple(shape))
        stored = len(_message(found.get(9, _EMPTY)))
        if stored and stored != fact.nbytes:
            raise ValueError(f"{name[:100]} has {stored} bytes, and its shape asks for {fact.nbytes}")
        return fact, _is_external(found)

    def _value_info(self, view: memoryview) -> tuple[str, tuple[Dimension, ...]]:
        fields = dict(self._fields(view))
        shape: list[Dimension] = []
        tensor = dict(
            self._fields(_message(dict(self._fields(_message(fields.get(2, _EMPTY)))).get(1, _EMPTY)))
        )
        for number, value in self._fields(_message(tensor.get(2, _EMPTY))):
            if number == 1:
                size = dict(self._fields(_message(value))).get(1)
                shape.append(size if isinstance(size, int) else None)
        return _text(fields.get(1, _EMPTY)), tuple(shape)

    def _fields(self, view: memoryview) -> Iterator[tuple[int, Value]]:
        """Numbers and values of a message; a message inside is left as its bytes."""
        at = 0
        while at < len(view):
            key, at = _varint(view, at)
            number, kind = key >> 3, key & 7
            self._fields_left -= 1
            if self._fields_left < 0:
                raise ValueError(f"it has more than {_MAX_FIELDS} fields")
            if kind == _VARINT:
                value, at = _varint(view, at)
                yield number, value
                continue
            if kind == _BYTES:
                length, at = _varint(view, at)
            elif kind in (_FIXED32, _FIXED64):
                length = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"field {number} is of a kind that does not exist")
            if at + length > len(view):
                raise ValueError(f"field {number} is {length} bytes long, and {len(view) - at} are left")
            yield number, view[at : at + length]
            at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number is longer than ten bytes")


def _is_external(tensor: dict[int, Value]) -> bool:
    """`external_data` or `data_location` of a TensorProto."""
    return 13 in tensor or tensor.get(14) == 1


def _varints(view: memoryview) -> Iterator[int]:
    """Packed numbers: the sizes of a shape."""
    if len(view) > 10 * _MAX_RANK:
        raise ValueError("a shape has more dimensions than any tensor")
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")  # noqa: TRY004 - of a file, not of an argument
    return value


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message stands where a number should")  # noqa: TRY004 - the same
    return value


def _text(value: Value) -> str:
    text = bytes(_message(value)[: _MAX_NAME + 1]).decode()
    if len(text) > _MAX_NAME:
        raise ValueError(f"a name is longer than {_MAX_NAME} characters")
    return text


def _invalid(name: str, why: str) -> Exception:
    return refused(
        "header_invalid",
        f"{name} is no ONNX file that can be read: {why}.",
        hint="Export the network again, and check the file with `onnx.checker.check_model`.",
    )
