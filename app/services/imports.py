"""Fetch a model by URI into a work directory: `hf://org/model@revision`, or `file://` below the import root.

Runs in the thread of the request that asked for it and is bounded by `max_upload_bytes`: sizes are known and checked
before the first byte, and nothing is fetched that intake would leave out.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from app.errors import IntakeError, ModelpressError, NotFound, PayloadTooLarge, Unavailable
from app.intake.names import may_be_kept, safe_path, select
from app.intake.refusals import refused
from app.settings import Settings
from app.storage.staging import StagedFile, WorkDirectory

_READ_BYTES = 2**20
_MAX_FILES = 2000
_TRIES = 5
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)


@dataclass
class Fetched:
    """Files in staging by the path they came under, names that were not fetched, and where it all came from."""

    files: dict[str, StagedFile] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    source: str = "upload"
    single: str | None = None
    """Set when it is one file that may be an archive: its name."""


@dataclass(frozen=True)
class HubModel:
    """A model on a hub: repository, revision, and of several GGUF files the one that is meant."""

    repo: str
    revision: str
    file: str | None


def fetch(uri: str, work: WorkDirectory, settings: Settings) -> Fetched:
    """Fetch what a URI names. Raises IntakeError, NotFound, PayloadTooLarge, StorageFull and Unavailable."""
    scheme = urlsplit(uri).scheme
    if scheme == "hf":
        return _fetch_from_hub(parse_hub_uri(uri), work, settings)
    if scheme == "file":
        return _fetch_local(uri, work, settings)
    if scheme == "https":
        raise refused(
            "import_refused",
            "A file at an https:// URL is imported as an upload first.",
            hint="POST it to /v1/imports, wait until the upload is completed, and make the model of that.",
        )
    raise refused("import_refused", f"{scheme[:20]!r} is no scheme that can be imported from.")


def parse_hub_uri(uri: str) -> HubModel:
    """The parts of `hf://org/model@revision?file=name.gguf`; the revision is `main` where none is given."""
    parts = urlsplit(uri)
    repo, _, revision = (parts.netloc + parts.path).partition("@")
    files = parse_qs(parts.query, keep_blank_values=True)
    if not _REPO.fullmatch(repo) or not _REVISION.fullmatch(revision or "main") or set(files) - {"file"}:
        raise refused(
            "import_refused", f"{uri[:200]!r} names no model: it should read hf://org/model@revision."
        )
    file = files.get("file", [""])[0]
    return HubModel(repo, revision or "main", safe_path(file) if file else None)


def _fetch_from_hub(wanted: HubModel, work: WorkDirectory, settings: Settings) -> Fetched:
    from huggingface_hub import HfApi, hf_hub_url

    # False and not None: the token of whoever runs the service is not everybody's.
    api = HfApi(endpoint=settings.hub_endpoint, token=settings.hub_token or False)
    with _hub_errors(wanted):
        info = api.model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    if wanted.file is not None and wanted.file not in siblings:
        raise NotFound(f"{wanted.repo}@{wanted.revision} has no file {wanted.file}.")
    names = [wanted.file] if wanted.file else sorted(siblings)
    kept = [safe_path(name) for name in select(names).kept]
    sizes = {name: siblings[name].size or 0 for name in kept}
    _check_size(sum(sizes.values()), settings, work)
    fetched = Fetched(
        skipped=tuple(name for name in siblings if name not in kept and wanted.file is None),
        source=f"hf://{wanted.repo}@{info.sha or wanted.revision}",
    )
    for name in kept:
        url = hf_hub_url(
            wanted.repo, name, revision=info.sha or wanted.revision, endpoint=settings.hub_endpoint
        )
        with _hub_errors(wanted):
            staged = work.write_all(name, _download(url, settings, sizes[name]))
        lfs = siblings[name].lfs
        _check_fetched(name, staged, sizes[name], lfs.sha256 if lfs else None)
        fetched.files[name] = staged
    return fetched


def _download(url: str, settings: Settings, size: int) -> Iterator[bytes]:
    """The bytes of a file on the hub; a broken connection is taken up again where it broke."""
    at = 0
    for attempt in range(1, _TRIES + 1):
        try:
            for chunk in _stream(url, settings, at):
                at += len(chunk)
                if at > size:
                    raise refused("hash_mismatch", f"{url} has more than the {size} bytes announced.")
                yield chunk
        except _transport_errors():
            if attempt == _TRIES:
                raise
        else:
            return


def _stream(url: str, settings: Settings, start: int) -> Iterator[bytes]:
    """One request for the bytes from `start` on."""
    # Documented there, though the package does not mark them as exported.
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    headers = build_hf_headers(token=settings.hub_token or False) | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:
            raise Unavailable("The hub does not take up a broken download.", code="hub_unavailable")
        yield from response.iter_bytes(_READ_BYTES)


def _check_fetched(name: str, staged: StagedFile, size: int, sha256: str | None) -> None:
    if staged.bytes != size:
        raise refused("truncated", f"{name} came with {staged.bytes} bytes of {size}.")
    if sha256 not in (None, staged.sha256):
        raise refused("hash_mismatch", f"{name} came with sha256 {staged.sha256}, not {sha256}.")


class _hub_errors:  # noqa: N801 - reads as the with statement it is
    """Turn what huggingface_hub raises into errors that say what to do."""

    def __init__(self, wanted: HubModel) -> None:
        self._name = f"{wanted.repo}@{wanted.revision}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if error is None or isinstance(error, ModelpressError):
            return
        if isinstance(error, GatedRepoError):
            raise IntakeError(
                f"{self._name} is gated.",
                code="import_refused",
                hint="Ask the administrator to set MODELPRESS_HUB_TOKEN.",
            ) from error
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            raise NotFound(
                f"The hub has no {self._name}, or it is private.", hint="Check the name and the revision."
            ) from error
        if isinstance(error, (HfHubHTTPError, *_transport_errors())):
            raise Unavailable(
                f"The hub does not answer for {self._name}: {type(error).__name__}.",
                code="hub_unavailable",
                hint="Try again later, or upload the files.",
            ) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library under huggingface_hub raises, whichever it is in the version that is installed."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if base.__name__ == "HTTPError")


def _fetch_local(uri: str, work: WorkDirectory, settings: Settings) -> Fetched:
    parts = urlsplit(uri)
    root = settings.import_root
    if root is None:
        raise refused(
            "import_refused", "Imports from the server's disk are switched off.", hint="Upload the files."
        )
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise refused("import_refused", f"{uri[:200]!r} should read file:///path.")
    path = _below(root, Path(unquote(parts.path)))
    if not path.is_dir():
        _check_size(path.stat().st_size, settings, work)
        return Fetched({path.name: work.write_all("file", _read(path))}, (), uri, path.name)
    found = dict(sorted(_walk(root, path)))
    kept = {name: file for name, file in found.items() if may_be_kept(name)}
    _check_size(sum(file.stat().st_size for file in kept.values()), settings, work)
    fetched = Fetched(skipped=tuple(name for name in found if name not in kept), source=uri)
    for name, file in kept.items():
        fetched.files[name] = work.write_all(safe_path(name), _read(file))
    return fetched


def _below(root: Path, path: Path) -> Path:
    """The true place of a path, which must be a regular file or a folder below the true root."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        resolved = None
    if resolved is None or not resolved.is_relative_to(root.resolve()):
        # The same words whether it is missing or outside: nobody learns what is on the disk.
        raise refused("import_refused", f"{str(path)[:200]} is not there, or not below the import root.")
    if not stat.S_ISREG(resolved.stat().st_mode) and not resolved.is_dir():
        raise refused("import_refused", f"{str(path)[:200]} is no regular file.")
    return resolved


def _walk(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    count = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            count += 1
            if count > _MAX_FILES:
                raise refused("too_many_files", f"There are more than {_MAX_FILES} files in {folder.name}.")
            file = Path(directory) / name
            yield file.relative_to(folder).as_posix(), _below(root, file)


def _read(path: Path) -> Iterator[bytes]:
    # The path is resolved: a link that has taken the file's place since is not followed.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise refused("import_refused", f"{path.name} is no regular file.")
        while chunk := file.read(_READ_BYTES):
            yield chunk


def _check_size(size: int, settings: Settings, work: WorkDirectory) -> None:
    if size > settings.max_upload_bytes:
        raise PayloadTooLarge(
            f"It has {size} bytes; this service takes models of up to {settings.max_upload_bytes}."
        )
    work.require_free(size)
