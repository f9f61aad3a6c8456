"""Compare two encoders by the embeddings they give the same texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MOST_TEXTS_IN_PAIRS = 1500
Vectors = NDArray[np.float32]


def pooling_of(directory: Path) -> tuple[str, ...]:
    """How a model pools token embeddings, from sentence-transformers' `1_Pooling/config.json`; mean if it has none."""
    path = directory / "1_Pooling" / "config.json"
    modes = json.loads(path.read_text()) if path.is_file() else {}
    known = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "lasttoken")
    return tuple(mode for mode in known if modes.get(f"pooling_mode_{mode}")) or ("mean_tokens",)


def pool(tokens: Vectors, modes: tuple[str, ...]) -> Vectors:
    """Pool (tokens, hidden) to (hidden × modes,); special tokens count, as in sentence-transformers."""
    pooled = {
        "cls_token": lambda: tokens[0],
        "lasttoken": lambda: tokens[-1],
        "max_tokens": lambda: tokens.max(axis=0),
        "mean_tokens": lambda: tokens.mean(axis=0),
        "mean_sqrt_len_tokens": lambda: tokens.sum(axis=0) / np.sqrt(len(tokens)),
    }
    vector: Vectors = np.concatenate([pooled[mode]() for mode in modes])
    return vector


def cosines(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """Cosine of each row of a with the same row of b: two of (texts, size) -> (texts,); 0 where one is all zeros."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    products: NDArray[np.float64] = (a64 * b64).sum(axis=1)
    result: NDArray[np.float64] = np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
    return result


def pairwise_similarities(vectors: Vectors) -> NDArray[np.float64]:
    """Cosine of every pair of texts, the upper triangle: (texts, size) -> (pairs,)."""
    vectors64 = vectors[:_MOST_TEXTS_IN_PAIRS].astype(np.float64)
    norms = np.linalg.norm(vectors64, axis=1, keepdims=True)
    unit = np.divide(vectors64, norms, out=np.zeros_like(vectors64), where=norms > 0)
    similarities: NDArray[np.float64] = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
    return similarities


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Spearman's rho; None when one side has no two different values (Spearman 1904)."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    if np.ptp(ranks_a) == 0 or np.ptp(ranks_b) == 0:
        return None
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    shared: NDArray[np.float64] = (ends - (counts + 1) / 2)[inverse]
    return shared
