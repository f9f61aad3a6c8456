"""llama.cpp's command-line tools, for benchmarks that compare with it: found where they were built, or built from source.

The source is that in the sdist of `llama-cpp-python`, which pip fetches. Building needs cmake and a C++ compiler, and
took 25 minutes on two cores; it is done once, in a directory of its own, and nothing is installed anywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-tokenize")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip


@dataclass(frozen=True)
class LlamaCpp:
    """Where the tools are, and what version they say they are."""

    binaries: Path
    version: str

    def run(self, tool: str, *arguments: object) -> str:
        """Run a tool and return what it printed, both streams. Ends the benchmark with its last words if it fails."""
        command = [str(self.binaries / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        printed = done.stdout + done.stderr
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{printed[-2000:]}")
        return printed


def find_or_build(given: Path | None, cache: Path) -> LlamaCpp:
    """The tools in `given` (a build directory), in that of $LLAMA_CPP_BUILD, or built once below `cache`."""
    named = given or (Path(path) if (path := os.environ.get("LLAMA_CPP_BUILD")) else None)
    build = named or cache / "llama.cpp-build"
    if not _is_complete(build):
        if named is not None:
            raise SystemExit(
                f"{named}/bin lacks one of {', '.join(TOOLS)}: build these targets of llama.cpp."
            )
        _build(cache, build)
    return LlamaCpp(build / "bin", PACKAGE.replace("==", " ") + "'s llama.cpp")


def _is_complete(build: Path) -> bool:
    return all((build / "bin" / tool).is_file() for tool in TOOLS)


def _build(cache: Path, build: Path) -> None:
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"Building llama.cpp needs {' and '.join(missing)}. Install them (Debian: apt install cmake g++), or say "
            "where it is built: --llama-cpp DIRECTORY or LLAMA_CPP_BUILD."
        )
    cache.mkdir(parents=True, exist_ok=True)
    print(f"building llama.cpp in {build}, once; this takes half an hour", file=sys.stderr)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "--dest", str(cache), PACKAGE], check=True, stdout=sys.stderr)
    archive = next(cache.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as opened:
        opened.extractall(cache, filter="data")
    source = cache / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    configure = ["cmake", "-S", str(source), "-B", str(build), *_OPTIONS]
    subprocess.run(configure, check=True, stdout=sys.stderr)
    compile_ = ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1), "--target", *TOOLS]
    subprocess.run(compile_, check=True, stdout=sys.stderr)
