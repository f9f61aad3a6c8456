"""How a benchmark states a figure: one JSON object a line, and exit code 1 if a floor was missed."""

from __future__ import annotations

import json
import sys


class Figures:
    """Collects figures and prints each as it is known."""

    def __init__(self) -> None:
        self._missed = False

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
        self._missed |= not ok
        line = {
            "name": name,
            "value": round(value, 4),
            "unit": unit,
            "floor": floor,
            "ok": ok,
            "compared_with": compared_with,
        }
        print(json.dumps(line), flush=True)

    def exit(self) -> None:
        """End the benchmark: 1 if any floor was missed."""
        sys.exit(1 if self._missed else 0)
