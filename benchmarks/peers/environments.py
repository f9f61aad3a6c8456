"""A virtual environment for each peer: their pins conflict with ours and with each other's.

Usage: python benchmarks/peers/environments.py [NAME ...] [--cache DIRECTORY]

Made on first use below MODELPRESS_BENCH_CACHE (default: modelpress/benchmarks in the user's cache directory), anew when
`requirements/NAME.txt` changes. torch is installed first and by itself, with TORCH_PIP_ARGS if set: whatever comes later
is held to it and cannot bring another build.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
NAMES = tuple(sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))


def cache_directory() -> Path:
    """Where environments, artifacts and what can be made again are kept between runs."""
    if named := os.environ.get("MODELPRESS_BENCH_CACHE"):
        return Path(named)
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user / "modelpress" / "benchmarks"


def python_of(name: str, cache: Path) -> Path:
    """The Python of a peer's environment, made if it is not there or its requirements have changed."""
    directory, requirements = cache / "environments" / name, REQUIREMENTS / f"{name}.txt"
    made_from, wanted = directory / ".made-from", hashlib.sha256(requirements.read_bytes()).hexdigest()
    python = directory / "bin" / "python"
    if made_from.is_file() and made_from.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    print(f"making an environment for {name} in {directory}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
    subprocess.run(
        [*pip, *shlex.split(os.environ.get("TORCH_PIP_ARGS", "")), torch], check=True, stdout=sys.stderr
    )
    subprocess.run([*pip, "-r", str(requirements)], check=True, stdout=sys.stderr)
    made_from.write_text(wanted)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}; default: all")
    parser.add_argument("--cache", type=Path, default=cache_directory())
    arguments = parser.parse_args()
    for name in arguments.names or NAMES:
        print(python_of(name, arguments.cache))


if __name__ == "__main__":
    main()
