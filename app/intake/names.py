"""Names of files: which are safe, and which belong to a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from app.intake.refusals import Code, refused

MAX_PATH_BYTES = 1024
_MAX_DEPTH = 8
_MAX_COMPONENT_BYTES = 255
_DRIVE = re.compile(r"^[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
GRAPH = "model.onnx"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SIDE_FILE = re.compile(r".*\.(?:json|txt|model|tiktoken|jinja|md)|LICENSE|NOTICE", re.IGNORECASE)
_PICKLE = re.compile(r".*\.(?:bin|pt|pth|pkl|pickle|ckpt|joblib|dill)", re.IGNORECASE)
_CODE = re.compile(r".*\.(?:py|pyc|so|ipynb|sh)", re.IGNORECASE)
_SAFETENSORS = re.compile(r".*\.safetensors", re.IGNORECASE)
_GGUF = re.compile(r".*\.gguf", re.IGNORECASE)
_ONNX = re.compile(r".*\.onnx", re.IGNORECASE)


@dataclass(frozen=True)
class LeftOut:
    """A file that was not kept, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Which of the files make a model."""

    weights: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """All files of the model."""
        return self.side_files + self.weights


def safe_path(name: str) -> str:
    """A relative path without tricks, as it stands in an archive or a request. Raises IntakeError."""
    shown = name[:100].encode("utf-8", "backslashreplace").decode()
    parts = [part for part in name.split("/") if part not in ("", ".")]
    reason = _unsafe(name, parts)
    if reason:
        raise refused("archive_unsafe_path", f"{shown!r} {reason}.")
    return "/".join(parts)


def refuse_file_as_folder(name: str, files: Collection[str], folders: set[str]) -> None:
    """Raise IntakeError where a name is a folder of another, or has a file for a folder; adds its folders to `folders`."""
    parts = name.split("/")
    above = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    if name in folders or not above.isdisjoint(files):
        raise refused("archive_duplicate", f"{name[:100]!r} is a file and a folder.")
    folders |= above


def _unsafe(name: str, parts: list[str]) -> str | None:
    if _CONTROL.search(name):
        return "has characters no file name should have"
    if name.startswith("/") or _DRIVE.match(name):
        return "is an absolute path"
    if "\\" in name:
        return "has a backslash"
    if ".." in parts:
        return "leads out of its folder"
    too_long = any(len(part.encode()) > _MAX_COMPONENT_BYTES for part in parts)
    if not parts or too_long or len(parts) > _MAX_DEPTH or len(name.encode()) > MAX_PATH_BYTES:
        return "is empty, too long, or nested too deep"
    return None


def common_folder(names: Collection[str]) -> str:
    """The one folder all files lie in, with its slash; empty when they do not. `tar cf model.tar model/` makes one."""
    firsts = {name.split("/", 1)[0] for name in names}
    if len(firsts) != 1 or any("/" not in name for name in names):
        return ""
    return firsts.pop() + "/"


def may_be_kept(name: str) -> bool:
    """Whether a file can be of any use, by its name alone: others need not be written to disk at all."""
    base = name.rsplit("/", 1)[-1]
    return any(kind.fullmatch(base) for kind in (_SIDE_FILE, _SAFETENSORS, _GGUF, _ONNX))


def select(names: Iterable[str]) -> Selection:
    """Pick the files of one model out of a folder. Raises IntakeError when there is none, or more than one."""
    left = sorted(names)
    weights, left = _weights(left)
    depth = {name: name.count("/") for name in left}
    side = tuple(
        n for n in left if _SIDE_FILE.fullmatch(n.rsplit("/", 1)[-1]) and depth[n] <= 1 and n != INDEX
    )
    if weights and _SHARD.fullmatch(weights[0]):
        side += (INDEX,)
    out = tuple(LeftOut(name, _why_left_out(name)) for name in left if name not in side)
    return Selection(weights, tuple(sorted(side)), out)


def _weights(names: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The weight files, and all other names. The order of preference is that of transformers."""
    root = [name for name in names if "/" not in name]
    shards = [name for name in root if _SHARD.fullmatch(name)]
    single = [name for name in root if _SAFETENSORS.fullmatch(name)]
    ggufs = [name for name in names if _GGUF.fullmatch(name)]
    graphs = [name for name in root if _ONNX.fullmatch(name)]
    if WEIGHTS in root:
        chosen = [WEIGHTS]
    elif INDEX in root and shards:
        chosen = shards
    elif single:
        chosen = _only(single, "safetensors files and no " + INDEX)
    elif ggufs:
        chosen = _only(ggufs, "GGUF files")
    elif graphs:
        chosen = _only(graphs, "ONNX files")
    else:
        raise _no_weights(names)
    return tuple(chosen), [name for name in names if name not in chosen]


def _only(names: list[str], what: str) -> list[str]:
    if len(names) > 1:
        raise refused("weights_ambiguous", f"There are {len(names)} {what}: {', '.join(names[:5])}.")
    return names


def _no_weights(names: list[str]) -> Exception:
    pickles = [name for name in names if _PICKLE.fullmatch(name)]
    if pickles:
        return refused("unsafe_pickle", f"The only weights are in a pickle: {', '.join(pickles[:5])}.")
    code: Code = "weights_missing" if CONFIG in names else "unsupported_format"
    return refused(code, f"Among the {len(names)} files are no weights: {', '.join(names[:8])}.")


def _why_left_out(name: str) -> str:
    if _PICKLE.fullmatch(name):
        return "a pickle: never read; the safetensors are used"
    if _CODE.fullmatch(name):
        return "code: never run"
    if any(kind.fullmatch(name) for kind in (_SAFETENSORS, _GGUF, _ONNX)):
        return "not among the weights that are used"
    if _SIDE_FILE.fullmatch(name.rsplit("/", 1)[-1]):
        return "nested too deep"
    return "of no known use"
