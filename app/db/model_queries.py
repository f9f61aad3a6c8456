"""Every query on uploads, models and datasets, and on who needs which blob. None of them commits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Row, delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from app.db.engine import db_now
from app.db.tables import Artifact, Dataset, Job, Model, ModelFile, Upload, UploadPart

# Any number that no other advisory lock of ours has.
_BLOBS_LOCK = 0x6D70626C

UNFINISHED = ("queued", "running")
_EXPIRED_STAYS_SECONDS = 86_400
"""An expired artifact's blob is kept so long for those who began to download it."""


# --- uploads ---------------------------------------------------------------------------------------------------------


def add_upload(session: Session, upload: Upload, *, expires_in_seconds: float) -> Upload:
    """Insert an upload that expires after so many seconds of the database's clock, and read it back."""
    upload.expires_at = db_now() + expires_in_seconds
    session.add(upload)
    session.flush()
    session.refresh(upload)
    return upload


def get_upload(session: Session, upload_id: str) -> Upload | None:
    """An upload by id, expired or not."""
    return session.get(Upload, upload_id)


def get_upload_for_change(session: Session, upload_id: str) -> Upload | None:
    """An upload by id, locked until the transaction ends."""
    return session.get(Upload, upload_id, with_for_update=True)


def list_parts(session: Session, upload_id: str) -> Sequence[UploadPart]:
    """The parts of an upload that have arrived, in order."""
    return session.scalars(
        select(UploadPart).where(UploadPart.upload_id == upload_id).order_by(UploadPart.number)
    ).all()


def parts_among(session: Session, upload_id: str, numbers: Collection[int]) -> Sequence[UploadPart]:
    """The parts of an upload that have one of these numbers."""
    return session.scalars(
        select(UploadPart).where(UploadPart.upload_id == upload_id, UploadPart.number.in_(numbers))
    ).all()


def get_part(session: Session, upload_id: str, number: int) -> UploadPart | None:
    """A part that has arrived."""
    return session.get(UploadPart, (upload_id, number))


def add_part(session: Session, part: UploadPart) -> None:
    """Record a part that has arrived whole."""
    session.add(part)
    session.flush()


def add_parts(session: Session, parts: Iterable[UploadPart]) -> None:
    """Record parts that are announced."""
    session.add_all(parts)
    session.flush()


def begin_multipart(session: Session, upload: Upload, multipart_id: str) -> str:
    """Keep S3's name of an upload, locked by this transaction, unless it has one. Returns the one it has."""
    upload.multipart_id = upload.multipart_id or multipart_id
    session.flush()
    return upload.multipart_id


def complete_upload(
    session: Session, upload_id: str, *, sha256: str | None, expires_in_seconds: float
) -> bool:
    """Mark an open upload as completed. False: it is not open any more."""
    done = session.execute(
        update(Upload)
        .where(Upload.id == upload_id, Upload.status == "open")
        .values(status="completed", sha256=sha256, expires_at=db_now() + expires_in_seconds)
        .returning(Upload.id)
    ).one_or_none()
    return done is not None


def delete_uploads(session: Session, upload_ids: Collection[str]) -> dict[str, str | None]:
    """Delete uploads and their parts. Returns the ids of those that were there, with S3's names of them."""
    gone = delete(Upload).where(Upload.id.in_(upload_ids)).returning(Upload.id, Upload.multipart_id)
    return {row.id: row.multipart_id for row in session.execute(gone)}


def delete_expired_uploads(session: Session) -> list[str]:
    """Delete uploads past their time, completed and unused ones too. Returns their ids."""
    return list(
        session.scalars(delete(Upload).where(Upload.expires_at < db_now()).returning(Upload.id)).all()
    )


def known_uploads(session: Session, upload_ids: Collection[str]) -> set[str]:
    """Which of these ids are uploads."""
    return set(session.scalars(select(Upload.id).where(Upload.id.in_(upload_ids))).all())


def multiparts_of(session: Session, upload_ids: Collection[str]) -> dict[str, str | None]:
    """Those of these ids that are uploads, with S3's names of them."""
    query = select(Upload.id, Upload.multipart_id).where(Upload.id.in_(upload_ids))
    return {row.id: row.multipart_id for row in session.execute(query)}


# --- models ----------------------------------------------------------------------------------------------------------


def add_model(session: Session, model: Model, files: Iterable[ModelFile]) -> Model:
    """Insert a model with its files, and read it back."""
    session.add(model)
    session.flush()
    session.add_all(files)
    session.flush()
    session.refresh(model)
    return model


def get_model(session: Session, model_id: str) -> Model | None:
    """A model by id."""
    return session.get(Model, model_id)


def get_model_for_use(session: Session, model_id: str) -> Model | None:
    """A model by id that stays until this transaction ends: for whoever inserts a job on it."""
    return session.get(Model, model_id, with_for_update={"read": True})


def get_model_for_change(session: Session, model_id: str) -> Model | None:
    """A model by id that nobody can start to use until this transaction ends."""
    return session.get(Model, model_id, with_for_update=True)


def list_models(session: Session, *, limit: int, after: str | None) -> Sequence[Model]:
    """Models, newest first, from behind the id `after`."""
    query = select(Model).order_by(Model.id.desc()).limit(limit)
    return session.scalars(query if after is None else query.where(Model.id < after)).all()


def list_model_files(session: Session, model_id: str) -> Sequence[ModelFile]:
    """The files of a model, by path."""
    return session.scalars(
        select(ModelFile).where(ModelFile.model_id == model_id).order_by(ModelFile.path)
    ).all()


def files_of(session: Session, model_ids: Collection[str]) -> dict[str, list[ModelFile]]:
    """The files of several models, by model and path."""
    found: dict[str, list[ModelFile]] = {}
    query = select(ModelFile).where(ModelFile.model_id.in_(model_ids)).order_by(ModelFile.path)
    for file in session.scalars(query):
        found.setdefault(file.model_id, []).append(file)
    return found


def get_model_file(session: Session, model_id: str, path: str) -> ModelFile | None:
    """One file of a model."""
    return session.get(ModelFile, (model_id, path))


def delete_model(session: Session, model_id: str) -> None:
    """Delete a model and its list of files."""
    session.execute(delete(Model).where(Model.id == model_id))


# --- datasets --------------------------------------------------------------------------------------------------------


def add_dataset(session: Session, dataset: Dataset) -> Dataset:
    """Insert a dataset, and read it back."""
    session.add(dataset)
    session.flush()
    session.refresh(dataset)
    return dataset


def get_dataset(session: Session, dataset_id: str) -> Dataset | None:
    """A dataset by id."""
    return session.get(Dataset, dataset_id)


def get_dataset_for_use(session: Session, dataset_id: str) -> Dataset | None:
    """A dataset by id that stays until this transaction ends: for whoever inserts a job on it."""
    return session.get(Dataset, dataset_id, with_for_update={"read": True})


def get_dataset_for_change(session: Session, dataset_id: str) -> Dataset | None:
    """A dataset by id that nobody can start to use until this transaction ends."""
    return session.get(Dataset, dataset_id, with_for_update=True)


def list_datasets(session: Session, *, limit: int, after: str | None) -> Sequence[Dataset]:
    """Datasets, newest first, from behind the id `after`."""
    query = select(Dataset).order_by(Dataset.id.desc()).limit(limit)
    return session.scalars(query if after is None else query.where(Dataset.id < after)).all()


def delete_dataset(session: Session, dataset_id: str) -> None:
    """Delete a dataset."""
    session.execute(delete(Dataset).where(Dataset.id == dataset_id))


# --- who needs what --------------------------------------------------------------------------------------------------


def list_unfinished_jobs(session: Session) -> Sequence[Row[tuple[str, str, dict[str, Any]]]]:
    """Jobs that have not ended: (id, model_id, spec)."""
    return session.execute(select(Job.id, Job.model_id, Job.spec).where(Job.status.in_(UNFINISHED))).all()


def hold_blobs(session: Session) -> None:
    """Let no one else add or drop references to blobs until this transaction ends.

    Whoever puts a blob and inserts the row that refers to it does both after this call, in one transaction; whoever
    deletes blobs without references looks for them after this call. On SQLite there is one writer at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_BLOBS_LOCK)))
    else:
        session.execute(text("SELECT 1"))


def referenced_blobs(session: Session, digests: Collection[str]) -> set[str]:
    """Which of these blobs a model, a dataset or an artifact refers to, one that expired in the last day included."""
    kept = or_(Artifact.expired_at.is_(None), Artifact.expired_at > db_now() - _EXPIRED_STAYS_SECONDS)
    queries = (
        select(ModelFile.sha256).where(ModelFile.sha256.in_(digests)),
        select(Dataset.sha256).where(Dataset.sha256.in_(digests)),
        select(Artifact.sha256).where(Artifact.sha256.in_(digests), kept),
    )
    return {sha256 for query in queries for sha256 in session.scalars(query)}


def blobs_and_who_wants_them(session: Session) -> dict[str, tuple[str, ...]]:
    """Every blob that must be there, with the rows that say so: `mdl_…/path`, `dst_…`, `job_…/path`. In order of digest."""
    rows = [
        *session.execute(select(ModelFile.sha256, ModelFile.model_id + "/" + ModelFile.path)),
        *session.execute(select(Dataset.sha256, Dataset.id)),
        *session.execute(
            select(Artifact.sha256, Artifact.job_id + "/" + Artifact.path).where(
                Artifact.expired_at.is_(None)
            )
        ),
    ]
    wanted: dict[str, tuple[str, ...]] = {}
    for sha256, who in sorted((row[0], row[1]) for row in rows):
        wanted[sha256] = (*wanted.get(sha256, ()), who)
    return wanted
