"""What a training has come to, on disk: the best state, and now and then all that is needed to go on after a kill.

best-00000040        the parameters, and what else changes, at the best look so far
state-00000060       the same and the optimizer's moments at a later step, from which the training goes on
record.json          how the training went up to there, and which best belongs to it; written last, so what it names is whole
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Of the training's time, at most a twentieth goes into states that only a kill would need.
_RARITY = 20


class Snapshots:
    """The states of one training, in a directory of their own that outlives the process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._record = directory / "record.json"
        self._best: Path | None = None
        self._recorded: Path | None = None
        self._next_at = 0.0

    def keep_best(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Write parameters, and what else training changes, at a look that was better than all before."""
        before, self._best = self._best, self._directory / f"best-{step:08d}"
        _write(self._best, {name: tensor.detach() for name, tensor in state.items()})
        # Between two snapshots there may be many looks: only what the last snapshot names is still needed.
        if before is not None and before not in (self._best, self._recorded):
            before.unlink(missing_ok=True)

    @torch.no_grad()
    def restore_best(self, state: Mapping[str, Tensor]) -> None:
        """Give it the values it had at the best look."""
        if self._best is None:
            raise ValueError("no state was kept")
        with safe_open(self._best, "pt") as file:
            for name, tensor in state.items():
                tensor.copy_(file.get_tensor(name))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        record: dict[str, Any],
    ) -> None:
        """Write what the training needs to go on at this step, unless that was done shortly before."""
        began = time.monotonic()
        if began < self._next_at or self._best is None:
            return
        state = self._directory / f"state-{step:08d}"
        written: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            written[f"value/{name}"] = tensor.detach()
            written |= {f"{key}/{name}": value for key, value in optimizer.state.get(tensor, {}).items()}
        _write(state, written)
        self._commit(record | {"state": state.name, "best": self._best.name})
        self._recorded = self._best
        for old in {*self._directory.glob("state-*"), *self._directory.glob("best-*")} - {state, self._best}:
            old.unlink()
        ended = time.monotonic()
        self._next_at = ended + _RARITY * (ended - began)

    @torch.no_grad()
    def restore(
        self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any] | None:
        """Set tensors and optimizer to where a killed training was, and return its record; None if there was none."""
        if not self._record.is_file():
            return None
        record: dict[str, Any] = json.loads(self._record.read_text())
        self._best = self._recorded = self._directory / record["best"]
        with safe_open(self._directory / record["state"], "pt") as file:
            for stored in file.keys():  # noqa: SIM118 - no dict
                key, name = stored.split("/", 1)
                tensor, value = tensors[name], file.get_tensor(stored)
                if key == "value":
                    tensor.copy_(value)
                else:
                    optimizer.state[tensor][key] = value.to(tensor.device)
        return record

    def _commit(self, record: dict[str, Any]) -> None:
        unfinished = self._directory / "unfinished"
        with unfinished.open("w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._record)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
