"""Memory of calibrated quantization, from shapes alone: what a plan says, and what the engine keeps to.

Beside the interpreter: one block's weights, the second moments H of its inputs (factored in their own memory), the rows
that are being solved, what has been found, and the activations of the windows that run together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from app.spec.architectures import block_index, is_compressible
from app.spec.facts import ModelFacts, TensorFact

_WEIGHTS_AT_ONCE = 2**23
_NARROW_WEIGHTS_AT_ONCE = 2**22
# Of small layers: more at once take more memory than they save time.
_ROWS_AT_ONCE = 1024
LOGITS_AT_ONCE = 2**22
"""Logits of a language model whose loss is differentiated at once."""
_SOLVING_BYTES = 44
"""Per weight that is solved at once: weights, codes, targets, differences and their like in float32, as measured in a sweep."""
_FOUND_BYTES = 2
"""Per weight of a site: codes in 8 bits, and packed."""
_WIDE_CODE_BYTES = 3
"""More per weight of a site where codes are kept in 32 bits."""
ACTIVATIONS = 12
"""Tensors of a window's (tokens, widest input) alive in a block's forward."""
_LATENT_BYTES = 8
"""Per weight of a block that is trained: where it would best be in float32, its codes before and now in 16 bits."""
_TRAINED_ACTIVATIONS = 30
"""Tensors of a window's (tokens, widest input) kept for the gradients."""
_LOGITS_COPIES = 7
"""Of the logits at once: as they come, in float32, their softmax, and the gradients of these, as measured."""
RUNTIME_BYTES = 60 * 2**20
"""What torch's kernels and allocators keep for themselves."""
# Layers that are called with one and the same input, in the names that architectures give them.
_SHARING = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q_lin", "k_lin", "v_lin"},
    {"q", "k", "v"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
)


def weights_at_once(columns: int, *, narrow: bool) -> int:
    """Weights of layers of so many inputs whose scales and codes are solved at once; `narrow`: where memory is short."""
    most = _NARROW_WEIGHTS_AT_ONCE if narrow else _WEIGHTS_AT_ONCE
    return min(most, _ROWS_AT_ONCE * columns)


_FEATURES_AT_ONCE = 2**20
"""Numbers in the widest tensor of a forward through a block, if one window has no more."""
_GPU_FEATURES_AT_ONCE = 2**26


def windows_at_once(tokens: int, widest: int, *, on_gpu: bool = False) -> int:
    """How many windows of so many tokens are run through a block together."""
    return max(1, (_GPU_FEATURES_AT_ONCE if on_gpu else _FEATURES_AT_ONCE) // (tokens * widest))


@dataclass(frozen=True)
class Site:
    """An input of a block that layers share."""

    features: int
    weights: int
    """Of all its layers."""


def sites_of(layers: Iterable[TensorFact]) -> list[Site]:
    """The distinct inputs of a block's linear layers."""
    found: dict[tuple[str, str], list[TensorFact]] = defaultdict(list)
    for layer in layers:
        parent, _, leaf = layer.name.removesuffix(".weight").rpartition(".")
        shared = next((min(names) for names in _SHARING if leaf in names), leaf)
        found[parent, shared].append(layer)
    return [Site(group[0].shape[1], sum(t.elements for t in group)) for group in found.values()]


def calibrated_bytes(
    tensors: Iterable[TensorFact],
    facts: ModelFacts,
    *,
    tokens: int,
    window: int,
    one_site_at_a_time: bool,
    trained: bool = False,
) -> int:
    """Peak beyond the interpreter's for a model of these tensors; `facts` are those of the original.

    `tokens` of calibration in windows of `window`: of the embeddings only the rows that are looked up are read. With
    `one_site_at_a_time` only one H is held. `trained`: the block's codes are trained after they are solved.
    """
    weights: dict[int, int] = defaultdict(int)
    inside: dict[int, list[TensorFact]] = defaultdict(list)
    width = 4
    for tensor in tensors:
        index = block_index(tensor.name)
        if index is not None:
            width = 2 if tensor.dtype == "BF16" else 4
            weights[index] += tensor.elements * width
            if is_compressible(tensor.name, tensor.shape):
                inside[index].append(tensor)
    embeddings = min(tokens, facts.vocab_size) * facts.hidden_size * width
    peaks = [
        weights[index]
        + _solving(sites_of(found), window, width, one_site_at_a_time=one_site_at_a_time)
        + (_training(sites_of(found), window, width) if trained else 0)
        for index, found in inside.items()
    ]
    return max(peaks, default=0) + embeddings + RUNTIME_BYTES


def wide_code_bytes(tensors: Iterable[TensorFact]) -> int:
    """What is held beside that where codes are no integers and no halves of bytes either: NF4's."""
    inside: dict[int | None, list[TensorFact]] = defaultdict(list)
    for tensor in tensors:
        if is_compressible(tensor.name, tensor.shape):
            inside[block_index(tensor.name)].append(tensor)
    sites = (site.weights for found in inside.values() for site in sites_of(found))
    return _WIDE_CODE_BYTES * max(sites, default=0)


def gradient_bytes(tensors: Iterable[TensorFact], facts: ModelFacts, *, tokens: int, window: int) -> int:
    """Peak beyond the interpreter's while a model is run backwards block by block; arguments as above."""
    weights: dict[int, int] = defaultdict(int)
    widest = largest = 0
    width = 4
    for tensor in tensors:
        index = block_index(tensor.name)
        if index is None:
            continue
        width = 2 if tensor.dtype == "BF16" else 4
        weights[index] += tensor.elements
        if is_compressible(tensor.name, tensor.shape):
            widest, largest = max(widest, *tensor.shape), max(largest, tensor.elements)
    table = facts.vocab_size * facts.hidden_size * width
    embeddings = min(tokens, facts.vocab_size) * facts.hidden_size * width
    # Sums of magnitudes in float32, what is written of them, one layer's gradient, and what is kept for the gradients.
    block = max(weights.values(), default=0) * (width + 4 + 2) + largest * width
    activations = _TRAINED_ACTIVATIONS * window * widest * width
    # Kernels keep a copy of the head in an order of their own.
    tail = 2 * table + _LOGITS_COPIES * 4 * LOGITS_AT_ONCE if facts.family == "causal_lm" else 0
    return max(block + activations, tail) + embeddings + RUNTIME_BYTES


def _training(sites: list[Site], window: int, width: int) -> int:
    """What training a block holds: latents, the codes twice, original weights, gradients, and activations for those."""
    weights, widest = sum(site.weights for site in sites), max(site.features for site in sites)
    return weights * (_LATENT_BYTES + 2 * width) + _TRAINED_ACTIVATIONS * window * widest * width


def _solving(sites: list[Site], window: int, width: int, *, one_site_at_a_time: bool) -> int:
    """The most that is held at once beside a block's weights."""
    moments = [4 * site.features**2 for site in sites]
    held = 0 if one_site_at_a_time else sum(moments)
    found = sum(site.weights for site in sites) // 2
    peak = 0
    for site, moment in zip(sites, moments, strict=True):
        at_once = weights_at_once(site.features, narrow=one_site_at_a_time)
        rows = _SOLVING_BYTES * min(site.weights, at_once) + _FOUND_BYTES * site.weights
        own = moment if one_site_at_a_time else 0
        peak = max(peak, own + held + rows)
        # A site's H is freed once its layers are solved.
        held = max(0, held - moment)
    widest = max(site.features for site in sites)
    tokens = window * windows_at_once(window, widest)
    return max(peak + found, ACTIVATIONS * tokens * widest * width + sum(moments))
