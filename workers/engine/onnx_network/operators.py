"""What each ONNX operator computes, as a function of tensors with the operator's attributes as keyword arguments.

Their meaning is that of the ONNX operators' reference; of attributes, those that convolutional networks use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Pair = Sequence[int]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Pair = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Pair = (1, 1),
    group: int = 1,
    kernel_shape: Pair = (),
    auto_pad: str = "NOTSET",
) -> Tensor:
    """Two-dimensional convolution: (images, channels, height, width) -> the same with other sizes."""
    kernel = tuple(weight.shape[2:]) if not kernel_shape else tuple(kernel_shape)
    x, symmetric = _padded(x, _pads(x, kernel, strides, dilations, pads, auto_pad), value=0.0)
    return functional.conv2d(x, weight, bias, tuple(strides), symmetric, tuple(dilations), group)


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Pair,
    strides: Pair = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Pair = (1, 1),
    ceil_mode: int = 0,
    auto_pad: str = "NOTSET",
    storage_order: int = 0,  # noqa: ARG001 - of the indices, which nobody reads
) -> Tensor:
    """The largest of each window; padding never is."""
    amounts = _pads(x, kernel_shape, strides, dilations, pads, auto_pad)
    limit = tuple(size // 2 for size in kernel_shape)
    padded, symmetric = _padded(x, amounts, value=float("-inf"), limit=limit)
    pooled = functional.max_pool2d(
        padded, tuple(kernel_shape), tuple(strides), symmetric, tuple(dilations), bool(ceil_mode)
    )
    return _begun_inside(pooled, x, amounts, strides) if ceil_mode else pooled


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Pair,
    strides: Pair = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Pair = (1, 1),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
) -> Tensor:
    """The mean of each window, over what lies inside the image unless `count_include_pad`. Raises ValueError for dilated windows."""
    if any(dilation != 1 for dilation in dilations):
        raise ValueError(f"AveragePool has dilations = {tuple(dilations)}, and means are taken of neighbours")
    amounts = top, left, bottom, right = _pads(x, kernel_shape, strides, (1, 1), pads, auto_pad)

    def mean(values: Tensor) -> Tensor:
        padded = functional.pad(values, (left, right, top, bottom))
        pooled = functional.avg_pool2d(padded, tuple(kernel_shape), tuple(strides), ceil_mode=bool(ceil_mode))
        return _begun_inside(pooled, values, amounts, strides) if ceil_mode else pooled

    return mean(x) if count_include_pad or not any(amounts) else mean(x) / mean(torch.ones_like(x[:1, :1]))


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,  # noqa: ARG001 - 1 in every set of operators that is read
) -> Tensor:
    """(x − mean) / √(var + epsilon) · scale + bias by channel; in training with the batch's own, which move the two."""
    return functional.batch_norm(x, mean, var, scale, bias, bool(training_mode), 1 - momentum, epsilon)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha · A B + beta · C."""
    product = (a.t() if transA else a) @ (b.t() if transB else b)
    product = product if alpha == 1.0 else alpha * product
    return product if c is None else product + (c if beta == 1.0 else beta * c)


def clip(
    x: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    min: float | None = None,  # noqa: A002 - ONNX's spelling
    max: float | None = None,  # noqa: A002
) -> Tensor:
    """Limit to what the inputs or, before opset 11, the attributes say."""
    return torch.clamp(x, min if low is None else float(low), max if high is None else float(high))


def pad(
    x: Tensor,
    amounts: Tensor | None = None,
    value: Tensor | None = None,
    *,
    mode: str = "constant",
    pads: Sequence[int] = (),
) -> Tensor:
    """Rows and columns around each image, of a constant or `reflect`ed."""
    given = list(pads) if amounts is None else [int(amount) for amount in amounts.tolist()]
    half = len(given) // 2
    ends = [size for axis in reversed(range(half)) for size in (given[axis], given[half + axis])]
    if mode == "constant":
        return functional.pad(x, ends, value=0.0 if value is None else float(value))
    # Torch reflects the last axes alone.
    return functional.pad(x, ends[:4], mode="replicate" if mode == "edge" else mode)


def reduce_mean(
    x: Tensor,
    over: Tensor | None = None,
    *,
    axes: Sequence[int] = (),
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """Mean over the axes that the input or, before opset 18, the attribute names; where none are, over all."""
    chosen = _axes(over, axes)
    if not chosen and noop_with_empty_axes:
        return x
    return x.mean(chosen or tuple(range(x.dim())), keepdim=bool(keepdims))


def global_average_pool(x: Tensor) -> Tensor:
    """Mean of each channel: (images, channels, height, width) -> (images, channels, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Two axes out of many: those before `axis`, and the rest."""
    return x.flatten(axis) if axis == 1 else x.reshape(x.shape[:axis].numel(), -1)


def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Another shape for the same elements; 0 keeps a size."""
    sizes = [int(size) for size in shape.tolist()]
    kept = [x.shape[axis] if size == 0 and not allowzero else size for axis, size in enumerate(sizes)]
    return x.reshape(kept)


def squeeze(x: Tensor, over: Tensor | None = None, *, axes: Sequence[int] = ()) -> Tensor:
    """Without axes of size 1."""
    return x.squeeze(_axes(over, axes)) if over is not None or axes else x.squeeze()


def unsqueeze(x: Tensor, over: Tensor | None = None, *, axes: Sequence[int] = ()) -> Tensor:
    """With axes of size 1, counted in the result."""
    for axis in sorted(_axes(over, axes)):
        x = x.unsqueeze(axis)
    return x


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Rows of an axis by their numbers, as exporters pick sizes out of shapes."""
    chosen = x.index_select(axis, indices.reshape(-1))
    return chosen.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes, as a tensor."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Shares that add up to one along an axis."""
    return x.softmax(axis)


def concat(*parts: Tensor, axis: int) -> Tensor:
    """One after the other along an axis."""
    return torch.cat(parts, axis)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """alpha · x + beta, limited to 0 and 1."""
    return (alpha * x + beta).clamp(0, 1)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """X where it is positive, else alpha · x."""
    return functional.leaky_relu(x, alpha)


def identity(x: Tensor) -> Tensor:
    """X."""
    return x


def dropout(x: Tensor, *_training: Tensor, ratio: float = 0.5, seed: int = 0) -> Tensor:  # noqa: ARG001
    """X: a graph says what is computed when a network is used."""
    return x


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "Div": torch.div,
    "Dropout": dropout,
    "Flatten": flatten,
    "Gather": gather,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": functional.hardswish,
    "Identity": identity,
    "LeakyRelu": leaky_relu,
    "MatMul": torch.matmul,
    "MaxPool": max_pool,
    "Mul": torch.mul,
    "Pad": pad,
    "ReduceMean": reduce_mean,
    "Relu": torch.relu,
    "Reshape": reshape,
    "Shape": shape_of,
    "Sigmoid": torch.sigmoid,
    "Softmax": softmax,
    "Squeeze": squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Unsqueeze": unsqueeze,
}
"""By ONNX's names."""


def _axes(over: Tensor | None, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axes) if over is None else tuple(int(axis) for axis in over.tolist())


def _pads(
    x: Tensor, kernel: Pair, strides: Pair, dilations: Pair, pads: Sequence[int], auto_pad: str
) -> tuple[int, int, int, int]:
    """Rows and columns before and after: (top, left, bottom, right), ONNX's order."""
    if auto_pad in ("NOTSET", "VALID"):
        top, left, bottom, right = pads if auto_pad == "NOTSET" else (0, 0, 0, 0)
        return top, left, bottom, right
    before, after = [], []
    for size, window, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        outputs = -(-size // stride)
        missing = max(0, (outputs - 1) * stride + (window - 1) * dilation + 1 - size)
        smaller, larger = missing // 2, missing - missing // 2
        before.append(smaller if auto_pad == "SAME_UPPER" else larger)
        after.append(larger if auto_pad == "SAME_UPPER" else smaller)
    return before[0], before[1], after[0], after[1]


def _begun_inside(pooled: Tensor, x: Tensor, pads: tuple[int, int, int, int], strides: Pair) -> Tensor:
    """Without the windows that rounding up adds though they begin behind the image."""
    rows, columns = (
        -(-(size + before) // step) for size, before, step in zip(x.shape[2:], pads, strides, strict=False)
    )
    return pooled[..., :rows, :columns]


def _padded(
    x: Tensor, pads: tuple[int, int, int, int], *, value: float, limit: tuple[int, ...] | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """The tensor to work on and the symmetric padding left to do: what kernels pad themselves needs no copy."""
    top, left, bottom, right = pads
    if top == bottom and left == right and (limit is None or (top <= limit[0] and left <= limit[1])):
        return x, (top, left)
    return functional.pad(x, (left, right, top, bottom), value=value), (0, 0)
