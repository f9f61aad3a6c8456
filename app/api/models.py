"""Models: made of uploads, of a small body, or imported; then there to be compressed."""

from __future__ import annotations

import mimetypes
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.api.bodies import (
    FILE_ANSWERS,
    HEAD_ANSWERS,
    RAW_BODY,
    ContentDigest,
    FileName,
    chunks_of,
    parse_digest,
)
from app.api.dependencies import After, CurrentStores, Limit, Page, ReadSession, WriteSession
from app.api.idempotency import IdempotentRoute
from app.api.problems import problem_responses
from app.api.routing import id_path
from app.api.streams import BlobResponse
from app.api.texts import TEXT_PATTERN, Name
from app.db.tables import Artifact
from app.services import models
from app.services.job_view import link
from app.services.models import ModelState, Stores
from app.spec.base import Family
from app.spec.documented import Documented
from app.spec.facts import ModelFacts
from app.spec.preprocessing import Preprocessing
from app.threads import INTAKE

router = APIRouter(prefix="/models", tags=["models"], route_class=IdempotentRoute)

FilePath = Annotated[str, Path(pattern=TEXT_PATTERN, description="Path inside the model.")]
ModelId = Annotated[str, Path(pattern=r"^mdl_[0-9a-z]{1,40}$", description="Id of the model.")]
UploadId = Annotated[str, StringConstraints(pattern=r"^upl_[0-9a-z]{1,40}$")]


class UploadedFile(Documented):
    """An upload, and the place its file has in the model."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=TEXT_PATTERN)] = Field(
        examples=["config.json"]
    )
    """Path inside the model, e.g. `config.json` or `model-00001-of-00002.safetensors`."""
    upload: UploadId = Field(examples=["upl_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    """Id of a completed upload."""


class CreateModel(Documented):
    """Where a model comes from: give exactly one of `upload`, `files` and `uri`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct@main"},
                {"upload": "upl_01k0b6x2v9m4c8d7e5f3g1h0j2", "name": "my-model"},
            ]
        },
    )

    upload: UploadId | None = None
    """Id of a completed upload: a zip, tar or tar.gz of a Hugging Face folder, or one GGUF file."""
    files: Annotated[list[UploadedFile], Field(min_length=1, max_length=1000)] | None = None
    """Completed uploads, one for each file of a Hugging Face folder."""
    uri: Annotated[str, StringConstraints(min_length=6, max_length=2000, pattern=TEXT_PATTERN)] | None = None
    """`hf://org/model@revision` (of a repository with several GGUF files, `?file=name.gguf` says which), or
    `file:///path` below the server's import root, where it has one. The call returns when the model is here."""
    name: Name | None = None
    """What to call it; for people. Left out: the name of the file or repository."""

    @model_validator(mode="after")
    def _one_source(self) -> CreateModel:
        if sum(source is not None for source in (self.upload, self.files, self.uri)) != 1:
            raise ValueError('give exactly one of "upload", "files" and "uri"')
        paths = [file.path for file in self.files or ()]
        if len(set(paths)) != len(paths):
            raise ValueError("two of the files have the same path")
        return self


class ModelFile(Documented):
    """A file of a model."""

    path: str = Field(examples=["model.safetensors"])
    bytes: int
    sha256: str
    """sha256 of the file in hex."""
    url: str
    """Where to download it."""


class LeftOutFile(Documented):
    """A file that came with the model and was not kept."""

    path: str = Field(examples=["pytorch_model.bin"])
    reason: str = Field(examples=["a pickle: never read; the safetensors are used"])


class Model(Documented):
    """A model that can be compressed. All facts come from its headers; nothing of it was loaded."""

    id: str = Field(examples=["mdl_01k0b6x2v9m4c8d7e5f3g1h0j2"])
    name: str = Field(examples=["SmolLM2-135M-Instruct"])
    format: str = Field(examples=["safetensors"])
    """`safetensors` (Hugging Face folder) or `gguf`."""
    architecture: str = Field(examples=["LlamaForCausalLM"])
    """The transformers class."""
    family: Family
    parameters: int = Field(examples=[134515008])
    """Number of parameters that are stored; tied ones count once."""
    dtype: str = Field(examples=["BF16"])
    """What most weights are stored in."""
    hidden_size: int = Field(examples=[576])
    num_blocks: int = Field(examples=[30])
    """Transformer blocks (layers); 0 in a convolutional network."""
    vocab_size: int = Field(examples=[49152])
    """0 for models of images."""
    max_positions: int = Field(examples=[8192])
    """Longest context, in tokens; of a vision transformer, the tokens an image becomes."""
    preprocessing: Preprocessing | None
    """What becomes of an image before the model sees it; null for models of text."""
    tied_embeddings: bool
    num_labels: int | None
    """Outputs of the classification head; null where there is none."""
    bytes: int = Field(examples=[272585000])
    """Bytes of all files."""
    sha256: str
    """Over the sorted list of files and their digests: the same for the same files, however they came."""
    files: list[ModelFile]
    scan: list[LeftOutFile]
    """Files that were left out, and why."""
    source: str = Field(examples=["upload"])
    """`upload`, or the URI it was imported from."""
    created_at: datetime
    url: str


@router.post(
    "",
    operation_id="create_model",
    status_code=201,
    summary="Make a model of uploads, or import one",
    responses=problem_responses(404, 409, 507),
)
async def create_model(body: CreateModel, stores: CurrentStores, response: Response) -> Model:
    """Check what was uploaded (or fetch what the URI names), read its headers, and keep it.

    Uploads are used up, whether the model is accepted or refused: a refusal leaves nothing behind.
    """
    return _created(await INTAKE.run(_create, body, stores), response)


def _create(body: CreateModel, stores: Stores) -> ModelState:
    if body.upload is not None:
        return models.create_from_upload(stores, body.upload, body.name)
    if body.files is not None:
        return models.create_from_files(stores, {f.path: f.upload for f in body.files}, body.name)
    return models.create_from_uri(stores, body.uri or "", body.name)


@router.put(
    "/content",
    operation_id="put_model_content",
    status_code=201,
    summary="Send a small model as one body",
    responses=problem_responses(507),
    openapi_extra=RAW_BODY,
)
async def put_model_content(
    request: Request,
    response: Response,
    stores: CurrentStores,
    name: Annotated[
        FileName, Query(description="The file's name, e.g. `my-model.zip`.", examples=["my-model.zip"])
    ],
    content_digest: ContentDigest = None,
) -> Model:
    """Send a zip, tar or tar.gz of a Hugging Face folder, or a GGUF file, as the raw body. Each call makes a new model.

    For files of up to 512 MiB (the administrator may have set another limit); larger ones go up in parts.
    """
    state = await models.create_from_body(
        stores, chunks_of(request), file_name=name, sha256=parse_digest(content_digest)
    )
    return _created(state, response)


@router.get("", operation_id="list_models", summary="List models")
def list_models(session: ReadSession, limit: Limit = 20, after: After = None) -> Page[Model]:
    """Models, newest first."""
    states, has_more = models.list_models(session, limit=limit, after=after)
    return Page(items=[model_view(state) for state in states], has_more=has_more)


@router.get(
    id_path("model_id"), operation_id="get_model", summary="See a model", responses=problem_responses(404)
)
def get_model(model_id: ModelId, session: ReadSession) -> Model:
    """What the headers say about a model, and its files."""
    return model_view(models.get_model(session, model_id))


@router.delete(
    id_path("model_id"),
    operation_id="delete_model",
    status_code=204,
    summary="Delete a model",
    responses=problem_responses(404, 409),
)
def delete_model(model_id: ModelId, session: WriteSession, stores: CurrentStores) -> None:
    """Delete a model and those of its files that nothing else needs. Refused while a job that has not ended uses it."""
    models.delete_model(session, stores, model_id)


@router.head(
    "/{model_id}/files/{path:path}",
    operation_id="head_model_file",
    summary="Size and digest of a file of a model",
    response_class=FileResponse,
    responses={**HEAD_ANSWERS, **problem_responses(404)},
)
@router.get(
    "/{model_id}/files/{path:path}",
    operation_id="get_model_file",
    summary="Download a file of a model",
    response_class=FileResponse,
    responses={**FILE_ANSWERS, **problem_responses(404, 416)},
)
def get_model_file(model_id: ModelId, path: FilePath, request: Request, session: ReadSession) -> BlobResponse:
    """The bytes of one file, as they were uploaded."""
    file = models.get_model_file(session, model_id, path)
    media_type = mimetypes.guess_type(path)[0] or "application/octet-stream"
    # Only carries the file's facts to the response; it is never added to the session.
    shown = Artifact(path=file.path, media_type=media_type, sha256=file.sha256, bytes=file.bytes)
    return BlobResponse(shown, request.method)


def model_view(state: ModelState) -> Model:
    """A model as it is shown."""
    model, path = state.model, f"/models/{state.model.id}"
    facts = ModelFacts.model_validate(model.facts)
    return Model(
        id=model.id,
        name=model.name,
        format=model.format,
        architecture=model.architecture,
        family=Family(model.family),
        parameters=model.parameters,
        dtype=model.dtype,
        hidden_size=facts.hidden_size,
        num_blocks=facts.num_blocks,
        vocab_size=facts.vocab_size,
        max_positions=facts.max_positions,
        tied_embeddings=facts.tied_embeddings,
        num_labels=facts.num_labels,
        preprocessing=facts.preprocessing,
        bytes=model.bytes,
        sha256=model.sha256,
        files=[
            ModelFile(path=f.path, bytes=f.bytes, sha256=f.sha256, url=link(f"{path}/files/{f.path}"))
            for f in state.files
        ],
        scan=[LeftOutFile.model_validate(entry) for entry in model.scan],
        source=model.source,
        created_at=datetime.fromtimestamp(model.created_at, UTC),
        url=link(path),
    )


def _created(state: ModelState, response: Response) -> Model:
    shown = model_view(state)
    response.headers["Location"] = shown.url
    return shown
