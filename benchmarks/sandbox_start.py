"""What each level of the sandbox adds to the start of a job's process.

Usage: .venv/bin/python benchmarks/sandbox_start.py [--rounds 60]

Each round starts the interpreter once a level, in turns, and waits for its end. A level this machine does not have is said
and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from figures import Figures

from app.settings import SANDBOX_LEVELS, SandboxLevel
from workers import sandbox
from workers.sandbox_levels import probe

MAX_MS = 50
LIMITS = sandbox.Limits(threads=1, address_space_bytes=None, file_bytes=2**30, processor_seconds=60)


def start_ms(level: SandboxLevel, directory: Path) -> float:
    """Milliseconds from before the spawn to the end of an interpreter that does nothing."""
    scratch = directory / level
    scratch.mkdir(exist_ok=True)
    inside = sandbox.Sandbox(level=level, scratch=scratch, limits=LIMITS)
    with (directory / "pipe").open("wb") as pipe:
        began = time.perf_counter()
        command = [sys.executable, "-I", "-S", "-c", ""]
        process = sandbox.spawn(command, inside, pipe=pipe.fileno(), log=directory / "log")
        if sandbox.return_code(process, timeout_seconds=60) != 0:
            raise SystemExit((directory / "log").read_text())
        return (time.perf_counter() - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    figures = Figures("sandbox_start")
    with tempfile.TemporaryDirectory() as directory:
        outside = Path(directory)
        missing = {level: probe(level, outside) for level in SANDBOX_LEVELS if level != "process"}
        for level, why in missing.items():
            if why:
                print(f"not measured: {level}: {why}", file=sys.stderr)
        levels = [level for level in SANDBOX_LEVELS if not missing.get(level)]
        taken: dict[SandboxLevel, list[float]] = {level: [] for level in levels}
        for _ in range(rounds):
            for level in levels:
                taken[level].append(start_ms(level, outside))
    bare = taken["process"]
    for level in levels[:-1]:
        added = [ours - theirs for ours, theirs in zip(taken[level], bare, strict=True)]
        median, best = statistics.median(added), min(taken[level]) - min(bare)
        # Of the quickest rounds: on a shared machine the others tell how busy it was.
        ok, floor = best <= MAX_MS, f"<= {MAX_MS}"
        figures.add(f"{level}_added_ms", best, "ms", compared_with="level process", floor=floor, ok=ok)
        figures.add(f"{level}_added_median_ms", median, "ms", compared_with="level process")
    figures.add("process_start_ms", min(bare), "ms", compared_with="none")
    figures.exit()


if __name__ == "__main__":
    main()
