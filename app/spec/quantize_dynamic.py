"""Parameters of PyTorch's own dynamic int8, and the tensors it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from app.spec.architectures import Architecture, is_compressible
from app.spec.base import Format, Step
from app.spec.facts import TensorFact
from app.spec.quantize import GlobPatterns

CODES, SCALE = "weight_int8", "weight_scale"
"""What stands in the file for a layer's `weight`: another name, so that no loader takes codes for weights."""
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight")


class QuantizeDynamic(Step):
    """PyTorch's own dynamic int8: one scale per weight, inputs rounded to 7 bits as they come, on CPUs alone.

    What `torch.ao.quantization.quantize_dynamic` does to the linear layers of the blocks, number for number. For those who
    ask for it: PyTorch calls it deprecated, and inputs of language models do not bear it (SmolLM2-135M's perplexity
    triples), so set a limit under `acceptance`. Plain transformers cannot load the result; the page on techniques has a
    loader of forty lines.
    """

    produces: ClassVar[Format] = "torch-dynamic-int8"

    technique: Literal["quantize.dynamic"] = "quantize.dynamic"
    include_head: bool = False
    """Quantize the language-model head too, as PyTorch does unasked. A head tied to the embeddings is then stored beside
    them, so that the file grows."""
    ignore: GlobPatterns = ()
    """Layers left as they are: shell patterns on module names, e.g. `*.layers.0.*`, `*down_proj`."""


def stored_layer(module: str, shape: tuple[int, ...]) -> tuple[TensorFact, TensorFact]:
    """What stands for one weight of (rows, columns): its codes and its one scale."""
    return (
        TensorFact(name=f"{module}.{CODES}", dtype="I8", shape=shape),
        TensorFact(name=f"{module}.{SCALE}", dtype="F32", shape=(1,)),
    )


def head_source(tensors: Iterable[TensorFact], architecture: Architecture) -> TensorFact | None:
    """The weight of the language-model head: its own, or the word embeddings that it is tied to."""
    by_name = {t.name: t for t in tensors}
    if architecture.head in by_name:
        return by_name[architecture.head]
    return next((t for name, t in by_name.items() if name.endswith(_EMBEDDINGS)), None)


def tensors_after(
    step: QuantizeDynamic, tensors: tuple[TensorFact, ...], architecture: Architecture
) -> Iterator[TensorFact]:
    """The tensors of the result."""
    head = head_source(tensors, architecture) if step.include_head else None
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        is_chosen = is_compressible(tensor.name, tensor.shape) and not any(
            fnmatchcase(module, pattern) for pattern in step.ignore
        )
        if tensor == head:
            yield from stored_layer(architecture.head.removesuffix(".weight"), tensor.shape)
        if is_chosen:
            yield from stored_layer(module, tensor.shape)
        elif tensor.name != architecture.head or head is None:
            yield tensor
