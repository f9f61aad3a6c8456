"""What is compared: the cases (bits and activations), the peers' methods, and which setting of ours each is set against."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUR_SETTINGS = Path(__file__).parents[1] / "our_quantization.json"


@dataclass(frozen=True)
class Case:
    """A grid that all sides must use."""

    name: str
    bits: int
    grouped: bool = True
    int8_activations: bool = False
    pattern: str | None = None
    """Half of the weights are zero, in this pattern, and not quantized."""

    def title(self, group_size: int) -> str:
        """Its name with the group size, as figures bear it."""
        return f"{self.name}_g{group_size}" if self.grouped else self.name


@dataclass(frozen=True)
class PeerMethod:
    """A method of a peer with its settings."""

    name: str
    peer: str
    """Its environment and its runner."""
    method: str
    cases: tuple[str, ...]
    against: str = "fast"
    """The setting of ours that must beat it."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OurSetting:
    """Steps of ours under a name."""

    name: str
    cases: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]

    def for_case(self, case: Case, group_size: int) -> list[dict[str, Any]]:
        """The steps with the grid that the case asks for, where they leave it open."""
        grid = {"bits": case.bits, "group_size": group_size, "symmetric": True} if case.grouped else {}
        if case.pattern is not None:
            grid = {"pattern": case.pattern}
        return [grid | step for step in self.steps]


CASES = {
    case.name: case
    for case in (
        Case("int4", 4),
        Case("int3", 3),
        Case("int2", 2),
        Case("w8a8", 8, grouped=False, int8_activations=True),
        Case("sparse50", 16, grouped=False, pattern="unstructured"),
        Case("sparse2of4", 16, grouped=False, pattern="2:4"),
    )
}
PRUNING = tuple(name for name, case in CASES.items() if case.pattern is not None)
QUANTIZATION = tuple(name for name in CASES if name not in PRUNING)

_WEIGHT_ONLY = ("int4", "int3", "int2")

PEER_METHODS = {
    method.name: method
    for method in (
        PeerMethod("llmcompressor-gptq", "llmcompressor", "gptq", _WEIGHT_ONLY),
        PeerMethod("llmcompressor-awq", "llmcompressor", "awq", _WEIGHT_ONLY),
        PeerMethod("nncf-awq-scale-estimation", "nncf", "awq-scale-estimation", ("int4",)),
        PeerMethod("autoround-50", "autoround", "signround", _WEIGHT_ONLY, "tuned", {"iters": 50}),
        PeerMethod("autoround-200", "autoround", "signround", _WEIGHT_ONLY, "tuned-200", {"iters": 200}),
        PeerMethod("torchao-rtn", "torchao", "rtn", _WEIGHT_ONLY),
        PeerMethod("torchao-hqq", "torchao", "hqq", _WEIGHT_ONLY),
        PeerMethod(
            "llmcompressor-smoothquant-gptq", "llmcompressor", "smoothquant-gptq", ("w8a8",), "smoothed"
        ),
        PeerMethod("llmcompressor-sparsegpt", "llmcompressor", "sparsegpt", PRUNING),
        PeerMethod("llmcompressor-wanda", "llmcompressor", "wanda", PRUNING, "wanda"),
        PeerMethod("torchao-int8-dynamic", "torchao", "int8-dynamic", ("w8a8",)),
    )
}


def our_settings(path: Path, case: Case) -> dict[str, OurSetting]:
    """The settings of ours that a file gives for a case, by name.

    The file is a list of {name, cases, steps}; for weight-only cases steps leave out bits, group size and symmetry.
    """
    settings = [
        OurSetting(s["name"], tuple(s["cases"]), tuple(s["steps"])) for s in json.loads(path.read_text())
    ]
    return {setting.name: setting for setting in settings if case.name in setting.cases}
