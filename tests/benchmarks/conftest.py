"""Puts benchmarks on the path, as running one of them does, and offers a random Llama for them to measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
# For tiny_models.
sys.path.append(str(Path(__file__).parents[1] / "engine"))

from synthetic_llama import Shape, make_llama  # noqa: E402


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks whose tokens are bytes. Shared by all tests: read it, never write to it."""
    directory = tmp_path_factory.mktemp("llama")
    make_llama(directory, Shape(hidden=64, inner=128, keys=64, blocks=2, vocabulary=256))
    return directory
