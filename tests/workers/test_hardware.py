"""What a worker says it has."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from workers import hardware


def nvidia_smi(directory: Path, script: str) -> None:
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'NVIDIA H100, 81559 MiB'", ["NVIDIA H100, 81559 MiB"]),
        ("exit 9", []),
        ("exec sleep 60", []),
    ],
    ids=["answers", "fails", "hangs"],
)
def test_gpus_are_those_that_nvidia_smi_names_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, gpus: list[str]
) -> None:
    nvidia_smi(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(hardware, "_GPU_SECONDS", 1.0)
    assert hardware.gpus() == gpus
