from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from peers.catalogue import CASES, OUR_SETTINGS, PEER_METHODS, our_settings
from peers.environments import NAMES, REQUIREMENTS

from app.spec.compression import CompressionSpec

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NAMES)
def test_every_peer_is_pinned_and_has_our_torch(name: str) -> None:
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    worker = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "worker"
    ]
    torch = next(requirement for requirement in worker if requirement.startswith("torch=="))
    assert lines[0] == torch
    assert all("==" in line for line in lines)


def test_every_method_has_an_environment_a_runner_and_cases() -> None:
    for method in PEER_METHODS.values():
        assert method.peer in NAMES
        assert (REQUIREMENTS.parent / f"{method.peer}_run.py").is_file()
        assert set(method.cases) <= CASES.keys()


def test_our_settings_are_steps_of_a_spec() -> None:
    named = {setting["name"] for setting in json.loads(OUR_SETTINGS.read_text())}
    found = set()
    for case in CASES.values():
        for name, setting in our_settings(OUR_SETTINGS, case).items():
            steps = CompressionSpec.model_validate({"steps": setting.for_case(case, 64)}).steps
            assert all(not case.grouped or getattr(step, "bits", None) == case.bits for step in steps)
            found.add(name)
    assert found == named
