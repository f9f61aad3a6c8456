"""How a benchmark states a figure: one JSON object a line, and exit code 1 if a floor was missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from machine import description

RESULTS = Path(__file__).parent / "results"


class Figures:
    """Collects figures, prints each as it is known and, given a name, keeps them in `results/NAME.jsonl`.

    The first line there is the machine, the date and the commit; `remarks` go with them.
    """

    def __init__(self, keep_as: str | None = None, **remarks: str) -> None:
        self._missed = False
        self._file = RESULTS / f"{keep_as}.jsonl" if keep_as else None
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(description() | remarks) + "\n")

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        compared_with: str,
        floor: str | None = None,
        ok: bool = True,
    ) -> None:
        """State a figure. `floor` is the bar in words, e.g. `<= 300`; a figure without one is there to be read."""
        self._state(
            {
                "name": name,
                "value": round(value, 4),
                "unit": unit,
                "floor": floor,
                "ok": ok,
                "compared_with": compared_with,
            }
        )

    def add_against_peer(  # noqa: PLR0913 - what a line must say
        self,
        name: str,
        value: float,
        unit: str,
        *,
        peer: str,
        peer_version: str,
        peer_value: float,
        floor: str | None = None,
        ok: bool = True,
    ) -> None:
        """State a figure of ours beside a peer's, and ours over theirs as `ratio`; `floor` is a bar for that ratio."""
        self._state(
            {
                "name": name,
                "value": round(value, 5),
                "unit": unit,
                "peer": peer,
                "peer_version": peer_version,
                "peer_value": round(peer_value, 5),
                "ratio": round(value / peer_value, 4) if peer_value else None,
                "floor": floor,
                "ok": ok,
            }
        )

    @property
    def missed(self) -> bool:
        """Whether a floor was missed so far."""
        return self._missed

    def exit(self) -> None:
        """End the benchmark: 1 if any floor was missed."""
        sys.exit(1 if self._missed else 0)

    def _state(self, line: dict[str, str | float | bool | None]) -> None:
        self._missed |= not line["ok"]
        text = json.dumps(line)
        print(text, flush=True)
        if self._file:
            with self._file.open("a") as file:
                file.write(text + "\n")
