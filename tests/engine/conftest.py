"""Puts tests/engine on the path (for `tiny_models`), and offers its models, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, write_text

# One of several processes that share the tests (pytest-xdist) has a core; alone it has two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of the tiny model of an architecture. Shared by all tests: read it, never write to it."""
    made: dict[str, Path] = {}

    def directory_of(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tiny_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return directory_of


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of forty short documents, for calibration and training."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")
