"""Import the API in fresh processes: time, and what must not come along.

Usage: .venv/bin/python benchmarks/startup.py [--rounds 9]

Each round starts one process that imports app.main and one that imports only FastAPI and SQLAlchemy, in turns. The
floor holds for the quickest round: on a shared machine the others tell how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from figures import Figures

MAX_SECONDS = 1.0
PROBE = (
    "import time; began = time.perf_counter(); import {what}; seconds = time.perf_counter() - began; "
    "import sys, json; "
    "print(json.dumps([seconds, sorted({{m.split('.')[0] for m in sys.modules}} & {{'torch', 'workers'}})]))"
)


def probe(what: str) -> tuple[float, list[str]]:
    """Seconds to import modules in a fresh process, and which of the forbidden ones came along."""
    code = PROBE.format(what=what)
    # An installed service has its byte code on disk; a shell that forbids writing any would time the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    seconds, forbidden = json.loads(done.stdout)
    return seconds, forbidden


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    probe("app.main")  # compiles byte code and fills the page cache
    ours, reference, forbidden = [], [], set()
    for _ in range(rounds):
        seconds, found = probe("app.main")
        ours.append(seconds)
        forbidden.update(found)
        reference.append(probe("fastapi, sqlalchemy.orm")[0])
    best, peer = min(ours), "importing fastapi and sqlalchemy.orm alone"
    figures = Figures()
    figures.add(
        "startup_seconds", best, "s", compared_with="none", floor=f"< {MAX_SECONDS}", ok=best < MAX_SECONDS
    )
    figures.add("startup_median_seconds", statistics.median(ours), "s", compared_with="none")
    figures.add("startup_ratio", best / min(reference), "ratio", compared_with=peer)
    figures.add(
        "startup_forbidden_modules",
        len(forbidden),
        f"modules {sorted(forbidden)}",
        compared_with="torch and workers",
        floor="== 0",
        ok=not forbidden,
    )
    figures.exit()


if __name__ == "__main__":
    main()
