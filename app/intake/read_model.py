"""What the files that came in are, and which of them make the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.intake.archive import ArchiveKind, Unpacked, WriteFile, unpack
from app.intake.gguf_facts import gguf_facts
from app.intake.huggingface import huggingface_facts
from app.intake.names import CONFIG, GRAPH, WEIGHTS, LeftOut, Selection, common_folder, select
from app.intake.onnx_facts import onnx_facts
from app.intake.refusals import Code, refused
from app.intake.sniff import Kind, sniff
from app.intake.zip_reader import zip_names
from app.spec.facts import ModelFacts

_UPLOAD = "with the tensors named as transformers does, and upload it beside the model's config.json."
_TORCHSCRIPT_HINT = (
    "Programs are not run. Where you trust it, `safetensors.torch.save_file(dict(torch.jit.load(file).state_dict()), "
    f"'model.safetensors')`, {_UPLOAD}"
)
_PT2_HINT = (
    "Programs are not run. Where you trust it, `safetensors.torch.save_file(dict(torch.export.load(file).state_dict), "
    f"'model.safetensors')`, {_UPLOAD}"
)
_MAX_SIDE_FILE_BYTES = 256 * 2**20
_MAX_SIDE_FILES = 200


@dataclass(frozen=True)
class ReadModel:
    """A model that was accepted: its facts, its files by the path they will have, and what was left out."""

    facts: ModelFacts
    files: dict[str, Path]
    left_out: tuple[LeftOut, ...]


def read_model(files: Mapping[str, Path], skipped: tuple[str, ...] = ()) -> ReadModel:
    """Read the model in a folder's files, given by relative path; `skipped` are names that could be of no use.

    Headers alone are read. Raises IntakeError.
    """
    folder = common_folder([*files, *skipped])
    inside = {name.removeprefix(folder): path for name, path in files.items()}
    selection = select([*inside, *(name.removeprefix(folder) for name in skipped)])
    kept = {name: inside[name] for name in selection.kept}
    _check_side_files(kept, selection.side_files)
    if selection.weights[0].lower().endswith(".gguf"):
        name = selection.weights[0].rsplit("/", 1)[-1]
        path = kept[selection.weights[0]]
        # A GGUF carries its own config and tokenizer; what lies beside it is of no use to anyone.
        beside = tuple(LeftOut(side, "the GGUF file has its own") for side in selection.side_files)
        return ReadModel(gguf_facts(path, name), {name: path}, selection.left_out + beside)
    if selection.weights[0].lower().endswith(".onnx"):
        return _read_graph(kept, selection)
    facts = huggingface_facts(kept, selection)
    if len(selection.weights) == 1:
        # The only name that loaders look for.
        kept[WEIGHTS] = kept.pop(selection.weights[0])
    return ReadModel(facts, kept, selection.left_out)


def _read_graph(kept: dict[str, Path], selection: Selection) -> ReadModel:
    facts = onnx_facts(kept, selection.weights[0])
    # The only name that is looked for; and what is computed stands in the graph alone.
    kept[GRAPH] = kept.pop(selection.weights[0])
    beside = (LeftOut(CONFIG, "the graph says itself what it computes"),) if kept.pop(CONFIG, None) else ()
    return ReadModel(facts, kept, selection.left_out + beside)


def read_single_file(path: Path, name: str, *, write: WriteFile, max_bytes: int) -> Unpacked | None:
    """Unpack an archive through `write`; None for a GGUF file, which is a model by itself. Raises IntakeError."""
    kind = sniff(path)
    if kind == "gguf":
        return None
    archive: ArchiveKind | None = kind if kind in ("zip", "tar", "tar.gz") else None
    if archive is None:
        raise _refusal(kind, name)
    if archive == "zip":
        _refuse_torch_archive(path, name)
    return unpack(path, archive, write=write, max_bytes=max_bytes)


def _refuse_torch_archive(path: Path, name: str) -> None:
    """Programs first: there is a pickle in each of them too."""
    names = zip_names(path)
    inside = {entry.partition("/")[2] for entry in names}
    if (
        inside & {"models/model.json", "serialized_exported_program.json"}
        or "serialized_exported_program.json" in names
    ):
        raise refused(
            "unsafe_pickle", f"{name} is a torch.export archive: pickles around a program.", hint=_PT2_HINT
        )
    if "constants.pkl" in inside or any(entry.startswith("code/") for entry in inside):
        raise refused(
            "unsafe_pickle",
            f"{name} is TorchScript: a program, which can read and write files.",
            hint=_TORCHSCRIPT_HINT,
        )
    if any(entry == "data.pkl" or entry.endswith("/data.pkl") for entry in names):
        raise refused("unsafe_pickle", f"{name} is a PyTorch file: a zip archive around a pickle.")


def _refusal(kind: Kind, name: str) -> Exception:
    reasons: dict[Kind, tuple[Code, str]] = {
        "pickle": ("unsafe_pickle", "is a pickle"),
        "safetensors": (
            "config_missing",
            "is a safetensors file alone, which does not say what model it is of",
        ),
        "hdf5": ("unsupported_format", "is an HDF5 (Keras) file"),
        "other_archive": ("archive_unsupported", "is an archive of a kind that is not read"),
    }
    code, what = reasons.get(kind, ("unsupported_format", "is nothing Modelpress can read as a model"))
    hint = f"Send it together with its {CONFIG}: as an archive, or as separate files in one POST /v1/models."
    return refused(code, f"{name} {what}.", hint=hint if code == "config_missing" else None)


def _check_side_files(files: Mapping[str, Path], side_files: tuple[str, ...]) -> None:
    if len(side_files) > _MAX_SIDE_FILES:
        raise refused("too_many_files", f"There are {len(side_files)} files beside the weights.")
    for name in side_files:
        size = files[name].stat().st_size
        if size > _MAX_SIDE_FILE_BYTES:
            raise refused(
                "file_too_large", f"{name} has {size} bytes; {_MAX_SIDE_FILE_BYTES} at most are kept."
            )
