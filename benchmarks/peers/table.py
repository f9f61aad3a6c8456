"""Print a Markdown table for each model and case of what quantize_vs_peers.py left in its work directory.

Usage: python benchmarks/peers/table.py WORK_DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "method", "KL, mean", "Δ ln PPL (95 %)", "same top-1", "bits per weight", "seconds", "processor s", "peak MiB",
)  # fmt: skip


def main() -> None:
    for case in sorted({path.parent.parent for path in Path(sys.argv[1]).glob("*/*/*/outcome.json")}):
        print(f"### {case.parent.name}, {case.name}\n")
        print("|" + "|".join(f" {column} " for column in COLUMNS) + "|")
        print("|---" * len(COLUMNS) + "|")
        outcomes = [json.loads(path.read_text()) for path in case.glob("*/outcome.json")]
        for outcome in sorted(outcomes, key=lambda outcome: outcome["quality"]["kl_mean"]):
            print("|" + "|".join(f" {cell} " for cell in cells(outcome)) + "|")
        print()


def cells(outcome: dict[str, Any]) -> list[str]:
    """A method's measurements in words."""
    quality = outcome["quality"]
    low, high = quality["delta_ln_perplexity_low"], quality["delta_ln_perplexity_high"]
    return [
        outcome["name"],
        f"{quality['kl_mean']:.4f}",
        f"{quality['delta_ln_perplexity']:.4f} ({low:.4f} to {high:.4f})",
        f"{100 * quality['top1_agreement']:.1f} %",
        f"{outcome['bits_per_weight']:.2f}",
        f"{outcome['seconds']:.1f}",
        f"{outcome['processor_seconds']:.1f}",
        f"{outcome['peak_rss_bytes'] / 2**20:.0f}",
    ]


if __name__ == "__main__":
    main()
