"""Datasets: text or images of your own to calibrate, train and evaluate on."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict, Field

from app.api.bodies import RAW_TEXT, ContentDigest, FileName, chunks_of, parse_digest
from app.api.dependencies import After, CurrentStores, Limit, Page, ReadSession, WriteSession
from app.api.idempotency import IdempotentRoute
from app.api.models import UploadId
from app.api.problems import problem_responses
from app.api.routing import id_path
from app.api.texts import Name
from app.db import tables
from app.services import datasets
from app.services.job_view import link
from app.spec.documented import Documented
from app.spec.image_set import ImageSetFacts
from app.spec.text_set import TextSetFacts
from app.threads import INTAKE

router = APIRouter(prefix="/datasets", tags=["datasets"], route_class=IdempotentRoute)

DatasetId = Annotated[str, Path(pattern=r"^dst_[0-9a-z]{1,40}$", description="Id of the dataset.")]


class CreateDataset(Documented):
    """What to make a dataset of."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"upload": "upl_01k0b6x2v9m4c8d7e5f3g1h0j2", "name": "support-chats"}]
        },
    )

    upload: UploadId
    """Id of a completed upload: a .txt or .jsonl of text; an .npz or .safetensors of images, or a zip, tar or
    tar.gz of picture files."""
    name: Name | None = None
    """What to call it; for people. Left out: the file's name."""


class Dataset(Documented):
    """Text, kept as UTF-8 with documents separated by blank lines; or texts with labels, or images, kept as safetensors."""

    id: str = Field(examples=["dst_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    name: str = Field(examples=["support-chats.jsonl"])
    format: str = Field(examples=["jsonl"])
    """What it came as: `txt` or `jsonl`; `npz` or `safetensors` of images; `zip`, `tar` or `tar.gz` of picture
    files."""
    bytes: int = Field(examples=[1048576])
    """Bytes as it is kept."""
    sha256: str
    """sha256 of it as it is kept, in hex; reports quote it."""
    images: ImageSetFacts | None
    """How many images, of which size, and their labels; null for text."""
    texts: TextSetFacts | None
    """How many texts with labels, and those; null for images, and for text without."""
    created_at: datetime
    url: str


@router.post(
    "",
    operation_id="create_dataset",
    status_code=201,
    summary="Make a dataset of an upload",
    responses=problem_responses(404, 409, 507),
)
async def create_dataset(body: CreateDataset, stores: CurrentStores, response: Response) -> Dataset:
    """Check the text or the images and keep them. The upload is used up, whether it is accepted or refused."""
    dataset = await INTAKE.run(datasets.create_from_upload, stores, body.upload, body.name)
    return _created(dataset, response)


@router.put(
    "/content",
    operation_id="put_dataset_content",
    status_code=201,
    summary="Send a dataset as one body",
    responses=problem_responses(507),
    openapi_extra=RAW_TEXT,
)
async def put_dataset_content(
    request: Request,
    response: Response,
    stores: CurrentStores,
    name: Annotated[
        FileName,
        Query(
            description="The file's name, e.g. `chats.jsonl`: its ending says how to read it.",
            examples=["notes.txt"],
        ),
    ],
    content_digest: ContentDigest = None,
) -> Dataset:
    """Send a .txt (UTF-8; blank lines separate documents) or a .jsonl (one `{"text": …}` a line) as the raw body.

    For classifiers each line of a .jsonl may have a `label` too: an integer from 0, or the name that the model's config.json
    (id2label) has for the class.
    Or images: an .npz or a .safetensors of `images` (or `x`), uint8 of (images, height, width, channels) or (images,
    channels, height, width) as they are before any preprocessing, and, if they have any, `labels` (or `y`), integers from 0. Or a zip, tar or tar.gz of JPEG, PNG, WebP and BMP
    files; where they lie in several folders, side by side, the folders are their labels.
    """
    dataset = await datasets.create_from_body(
        stores, chunks_of(request), file_name=name, sha256=parse_digest(content_digest)
    )
    return _created(dataset, response)


@router.get("", operation_id="list_datasets", summary="List datasets")
def list_datasets(session: ReadSession, limit: Limit = 20, after: After = None) -> Page[Dataset]:
    """Datasets, newest first."""
    found, has_more = datasets.list_datasets(session, limit=limit, after=after)
    return Page(items=[_shown(dataset) for dataset in found], has_more=has_more)


@router.get(
    id_path("dataset_id"),
    operation_id="get_dataset",
    summary="See a dataset",
    responses=problem_responses(404),
)
def get_dataset(dataset_id: DatasetId, session: ReadSession) -> Dataset:
    """Size and digest of a dataset."""
    return _shown(datasets.get_dataset(session, dataset_id))


@router.delete(
    id_path("dataset_id"),
    operation_id="delete_dataset",
    status_code=204,
    summary="Delete a dataset",
    responses=problem_responses(404, 409),
)
def delete_dataset(dataset_id: DatasetId, session: WriteSession, stores: CurrentStores) -> None:
    """Delete a dataset. Refused while a job that has not ended uses it."""
    datasets.delete_dataset(session, stores, dataset_id)


def _shown(dataset: tables.Dataset) -> Dataset:
    return Dataset(
        id=dataset.id,
        name=dataset.name,
        format=dataset.format,
        bytes=dataset.bytes,
        sha256=dataset.sha256,
        images=None if dataset.images is None else ImageSetFacts.model_validate(dataset.images),
        texts=None if dataset.texts is None else TextSetFacts.model_validate(dataset.texts),
        created_at=datetime.fromtimestamp(dataset.created_at, UTC),
        url=link(f"/datasets/{dataset.id}"),
    )


def _created(dataset: tables.Dataset, response: Response) -> Dataset:
    shown = _shown(dataset)
    response.headers["Location"] = shown.url
    return shown
