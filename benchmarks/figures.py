"""How a benchmark states a figure: one JSON object a line, and exit code 1 if a floor was missed."""

from __future__ import annotations

import json
import sys


class Figures:
    """Collects figures and prints each as it is known."""

    def __init__(self) -> None:
        self._missed = False
        self.lines: list[dict[str, object]] = []

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

    def add_against_peer(  # noqa: PLR0913 - a figure has as many parts
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
        """State a figure beside a peer's, measured in the same run; `ratio` is ours over theirs."""
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

    def exit(self) -> None:
        """End the benchmark: 1 if any floor was missed."""
        sys.exit(1 if self._missed else 0)

    def _state(self, line: dict[str, object]) -> None:
        self._missed |= not line["ok"]
        self.lines.append(line)
        print(json.dumps(line), flush=True)
