"""Datasets: text or images to calibrate, train and evaluate on, kept in the one form the engine reads of each.

See app.intake.read_text, app.intake.read_labelled_text and app.intake.read_images.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from sqlalchemy.orm import Session

from app.db import model_queries as queries
from app.db.engine import after_commit
from app.db.tables import Dataset
from app.errors import Conflict, NotFound
from app.ids import new_id
from app.intake.read_dataset import read_dataset
from app.services.models import (
    Stores,
    discarding_blobs,
    publishing,
    receive_body,
    using_up,
)
from app.services.quotas import require_storage
from app.services.uploads import completed_upload, use_uploads
from app.spec.compression import CompressionSpec
from app.storage.references import discard_unreferenced
from app.storage.staging import StagedFile, WorkDirectory
from app.threads import INTAKE


def create_from_upload(stores: Stores, upload_id: str, name: str | None) -> Dataset:
    """Make a dataset of a completed upload, which is used up, accepted or not."""
    with using_up(stores, [upload_id]), stores.staging.work_directory() as work:
        file_name, staged = completed_upload(stores.database, stores.staging, work, upload_id)

        def use(session: Session) -> None:
            use_uploads(session, stores.staging, [upload_id])

        return _create(stores, work, staged, (file_name, name), use)


async def create_from_body(
    stores: Stores, chunks: AsyncIterator[bytes], *, file_name: str, sha256: bytes | None
) -> Dataset:
    """Make a dataset of one file, sent as a body."""
    with stores.staging.work_directory() as work:
        staged = await receive_body(work, chunks, stores.settings.max_raw_body_bytes, sha256)
        return await INTAKE.run(_create, stores, work, staged, (file_name, None), _use_nothing)


def get_dataset(session: Session, dataset_id: str) -> Dataset:
    """One dataset. Raises NotFound."""
    return _found(queries.get_dataset(session, dataset_id), dataset_id)


def list_datasets(session: Session, *, limit: int, after: str | None) -> tuple[Sequence[Dataset], bool]:
    """A page of datasets, newest first, and whether there are more."""
    found = queries.list_datasets(session, limit=limit + 1, after=after)
    return found[:limit], len(found) > limit


def delete_dataset(session: Session, stores: Stores, dataset_id: str) -> None:
    """Delete a dataset; its blob goes after the commit, unless something else refers to it. Raises Conflict while it is used."""
    dataset = _found(queries.get_dataset_for_change(session, dataset_id), dataset_id)
    for job in queries.list_unfinished_jobs(session):
        if dataset_id in CompressionSpec.model_validate(job.spec).dataset_ids():
            raise Conflict(
                f"Job {job.id} uses dataset {dataset_id} and has not ended.",
                code="dataset_in_use",
                hint=f"Wait for it, or POST /v1/jobs/{job.id}/cancel.",
            )
    digest = dataset.sha256
    queries.delete_dataset(session, dataset_id)
    after_commit(session, lambda: _drop_blob(stores, digest))


def _create(
    stores: Stores,
    work: WorkDirectory,
    staged: StagedFile,
    names: tuple[str, str | None],
    use: Callable[[Session], None],
) -> Dataset:
    """Normalise what came and keep it; `names` are those of the file and of the dataset."""
    file_name, name = names
    found = read_dataset(staged.path, file_name, max_bytes=stores.settings.max_upload_bytes)
    kept = work.write_all("dataset", found.chunks)
    dataset = Dataset(
        id=new_id("dst"),
        name=name or file_name,
        format=found.format,
        bytes=kept.bytes,
        sha256=kept.sha256,
        images=None if found.images is None else found.images.model_dump(mode="json"),
        texts=None if found.texts is None else found.texts.model_dump(mode="json"),
    )
    with discarding_blobs(stores, {kept.sha256}), publishing(stores, [kept]) as session:
        use(session)
        require_storage(session, kept.bytes)
        return queries.add_dataset(session, dataset)


def _use_nothing(session: Session) -> None:
    """For bodies, which come without an upload."""


def _drop_blob(stores: Stores, sha256: str) -> None:
    discard_unreferenced(stores.database, stores.blobs, {sha256})


def _found(dataset: Dataset | None, dataset_id: str) -> Dataset:
    if dataset is None:
        raise NotFound(f"There is no dataset {dataset_id}.", hint="GET /v1/datasets lists those there are.")
    return dataset
