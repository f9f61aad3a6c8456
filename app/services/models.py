"""Models: what becomes of uploaded or imported files, from staging to the store.

Reading, unpacking and copying take minutes and a transaction must not, so making a model opens its own short sessions:
everything is prepared in staging first, and then blobs and rows come into being together or not at all.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from sqlalchemy.orm import Session

from app.db import model_queries as queries
from app.db.engine import Database, after_commit
from app.db.tables import Model, ModelFile
from app.errors import Conflict, IntakeError, InvalidRequest, NotFound
from app.ids import new_id
from app.intake.names import refuse_file_as_folder, safe_path
from app.intake.read_model import ReadModel, read_model, read_single_file
from app.services.imports import Fetched, fetch
from app.services.quotas import require_storage
from app.services.uploads import completed_upload, remove_uploads, use_uploads
from app.settings import Settings
from app.spec.compression import CompressionSpec
from app.storage.parts import pump
from app.storage.references import discard_unreferenced
from app.storage.staging import StagedFile, Staging, WorkDirectory
from app.storage.store import ArtifactStore
from app.threads import INTAKE

_ARCHIVE_ENDINGS = (".tar.gz", ".tgz", ".zip", ".tar", ".gguf")


@dataclass(frozen=True)
class Stores:
    """Where a model's rows and bytes go."""

    database: Database
    staging: Staging
    blobs: ArtifactStore
    settings: Settings


@dataclass(frozen=True)
class ModelState:
    """A model and its files."""

    model: Model
    files: Sequence[ModelFile]


def create_from_upload(stores: Stores, upload_id: str, name: str | None) -> ModelState:
    """Make a model of one completed upload: an archive or a GGUF file. The upload is used up, accepted or not."""
    with using_up(stores, [upload_id]), stores.staging.work_directory() as work:
        file_name, staged = completed_upload(stores.database, stores.staging, work, upload_id)
        fetched = Fetched(files={file_name: staged}, single=file_name)
        return _create(stores, work, fetched, name, [upload_id])


def create_from_files(stores: Stores, files: Mapping[str, str], name: str | None) -> ModelState:
    """Make a model of several completed uploads, given by the path each file has in the model. They are used up."""
    upload_ids = list(files.values())
    if len(set(upload_ids)) != len(upload_ids):
        raise InvalidRequest("The same upload is named twice.", code="upload_named_twice")
    with using_up(stores, upload_ids), stores.staging.work_directory() as work:
        fetched = Fetched(
            files={
                safe_path(path): completed_upload(stores.database, stores.staging, work, upload_id)[1]
                for path, upload_id in files.items()
            }
        )
        folders: set[str] = set()
        for path in fetched.files:
            refuse_file_as_folder(path, fetched.files.keys(), folders)
        if len(fetched.files) != len(files):
            raise InvalidRequest("Two of the files have the same path.", code="path_named_twice")
        return _create(stores, work, fetched, name, upload_ids)


def create_from_uri(stores: Stores, uri: str, name: str | None) -> ModelState:
    """Import a model. Returns when it is here."""
    with stores.staging.work_directory() as work:
        fetched = fetch(uri, work, stores.settings)
        if name is None and fetched.single is None:
            name = uri.split("?", 1)[0].split("@", 1)[0].rstrip("/").rsplit("/", 1)[-1]
        return _create(stores, work, fetched, name, [])


async def create_from_body(
    stores: Stores, chunks: AsyncIterator[bytes], *, file_name: str, sha256: bytes | None
) -> ModelState:
    """Make a model of one small file, sent as a body."""
    with stores.staging.work_directory() as work:
        staged = await receive_body(work, chunks, stores.settings.max_raw_body_bytes, sha256)
        fetched = Fetched(files={file_name: staged}, single=file_name)
        return await INTAKE.run(_create, stores, work, fetched, None, ())


async def receive_body(
    work: WorkDirectory, chunks: AsyncIterator[bytes], limit: int, sha256: bytes | None
) -> StagedFile:
    """Write a body of at most `limit` bytes into a work directory, hashed on the way and checked."""
    with work.writer("body") as writer:
        if not await pump(chunks, writer.write, limit=limit):
            raise InvalidRequest(
                "The body is empty.", code="body_empty", hint="Send the file as the raw body."
            )
        staged = await asyncio.to_thread(writer.close)
    if sha256 is not None and sha256.hex() != staged.sha256:
        raise IntakeError(
            "The body arrived with another sha256 than its Content-Digest says.",
            code="hash_mismatch",
            hint="Check the file and its digest, and send it again.",
        )
    return staged


def get_model(session: Session, model_id: str) -> ModelState:
    """One model. Raises NotFound."""
    return ModelState(
        _found(queries.get_model(session, model_id), model_id), queries.list_model_files(session, model_id)
    )


def get_model_file(session: Session, model_id: str, path: str) -> ModelFile:
    """One file of a model. Raises NotFound."""
    _found(queries.get_model(session, model_id), model_id)
    file = queries.get_model_file(session, model_id, path)
    if file is None:
        raise NotFound(
            f"Model {model_id} has no file {path[:200]!r}.", hint="A model's `files` lists those it has."
        )
    return file


def list_models(session: Session, *, limit: int, after: str | None) -> tuple[list[ModelState], bool]:
    """A page of models, newest first, and whether there are more."""
    models = queries.list_models(session, limit=limit + 1, after=after)
    shown = models[:limit]
    files = queries.files_of(session, [model.id for model in shown])
    return [ModelState(model, files.get(model.id, ())) for model in shown], len(models) > limit


def delete_model(session: Session, stores: Stores, model_id: str) -> None:
    """Delete a model; its blobs go after the commit, those nothing else refers to. Raises Conflict while it is used."""
    _found(queries.get_model_for_change(session, model_id), model_id)
    for job in queries.list_unfinished_jobs(session):
        if model_id in (job.model_id, CompressionSpec.model_validate(job.spec).student_model_id()):
            raise Conflict(
                f"Job {job.id} uses model {model_id} and has not ended.",
                code="model_in_use",
                hint=f"Wait for it, or POST /v1/jobs/{job.id}/cancel.",
            )
    digests = {file.sha256 for file in queries.list_model_files(session, model_id)}
    queries.delete_model(session, model_id)
    after_commit(session, lambda: _drop_blobs(stores, digests))


@contextmanager
def discarding_blobs(stores: Stores, digests: set[str]) -> Iterator[None]:
    """Remove these blobs again if the block raises, unless something else refers to them."""
    try:
        yield
    except BaseException:
        _drop_blobs(stores, digests)
        raise


@contextmanager
def publishing(stores: Stores, files: Collection[StagedFile]) -> Iterator[Session]:
    """A transaction to insert the rows in that refer to these files, which are in the store until it is committed."""
    # Sending them may take minutes, which nobody should have to wait for. In between somebody may have deleted the last
    # other reference to one of them, and with it the blob.
    for file in files:
        stores.blobs.put_file(file.path, file.sha256)
    with stores.database.write() as session:
        queries.hold_blobs(session)
        for file in files:
            if not stores.blobs.exists(file.sha256):
                stores.blobs.put_file(file.path, file.sha256)
        yield session


@contextmanager
def using_up(stores: Stores, upload_ids: Sequence[str]) -> Iterator[None]:
    """A refused file leaves nothing behind, its upload included."""
    try:
        yield
    except IntakeError:
        remove_uploads(stores.database, stores.staging, upload_ids)
        raise


def _create(
    stores: Stores, work: WorkDirectory, fetched: Fetched, name: str | None, upload_ids: Sequence[str]
) -> ModelState:
    """Read what came in and make a model of it."""
    staged = dict(fetched.files)
    skipped = fetched.skipped
    if fetched.single is not None:
        only = staged[fetched.single]

        def write(path: str, chunks: Iterator[bytes]) -> None:
            unpacked[path] = work.write_all(f"unpacked/{path}", chunks)

        unpacked: dict[str, StagedFile] = {}
        result = read_single_file(
            only.path, fetched.single, write=write, max_bytes=stores.settings.max_upload_bytes
        )
        if result is not None:
            staged, skipped = unpacked, result.skipped
        else:
            is_named = fetched.single.lower().endswith(".gguf")
            staged = {safe_path(fetched.single if is_named else f"{fetched.single}.gguf"): only}
    read = read_model({path: file.path for path, file in staged.items()}, skipped)
    files = {path: _staged_at(staged, at) for path, at in read.files.items()}
    model = _model(read, files, name or _default_name(fetched), fetched.source)

    def use(session: Session) -> None:
        if upload_ids:
            use_uploads(session, stores.staging, upload_ids)

    return _publish(stores, model, files, use)


def _publish(
    stores: Stores, model: Model, files: Mapping[str, StagedFile], use: Callable[[Session], None]
) -> ModelState:
    """Put the blobs and insert the rows that refer to them, together."""
    with (
        discarding_blobs(stores, {file.sha256 for file in files.values()}),
        publishing(stores, files.values()) as session,
    ):
        use(session)
        require_storage(session, model.bytes)
        rows = [
            ModelFile(model_id=model.id, path=path, sha256=file.sha256, bytes=file.bytes)
            for path, file in sorted(files.items())
        ]
        return ModelState(queries.add_model(session, model, rows), rows)


def _model(read: ReadModel, files: Mapping[str, StagedFile], name: str, source: str) -> Model:
    facts = read.facts
    listing = "".join(f"{file.sha256}  {path}\n" for path, file in sorted(files.items()))
    return Model(
        id=new_id("mdl"),
        name=name,
        format=facts.format,
        architecture=facts.architecture,
        family=facts.family.value,
        parameters=facts.parameters,
        dtype=facts.dtype,
        bytes=sum(file.bytes for file in files.values()),
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
        facts=facts.model_dump(mode="json"),
        scan=[asdict(left_out) for left_out in read.left_out],
        source=source,
    )


def _staged_at(staged: Mapping[str, StagedFile], path: Path) -> StagedFile:
    return next(file for file in staged.values() if file.path == path)


def _default_name(fetched: Fetched) -> str:
    if fetched.single is None:
        return "model"
    name = PurePosixPath(fetched.single).name
    ending = next((e for e in _ARCHIVE_ENDINGS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] or name


def _drop_blobs(stores: Stores, digests: set[str]) -> None:
    discard_unreferenced(stores.database, stores.blobs, digests)


def _found(model: Model | None, model_id: str) -> Model:
    if model is None:
        raise NotFound(f"There is no model {model_id}.", hint="GET /v1/models lists those there are.")
    return model
