"""Imports: files at URLs, which become uploads that the service fills itself."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import ConfigDict, Field, StringConstraints

from app.api.bodies import FileName
from app.api.dependencies import CurrentSettings, WriteSession
from app.api.idempotency import IdempotentRoute
from app.api.problems import problem_responses
from app.api.request_body import RequestBody
from app.api.texts import TEXT_PATTERN
from app.api.uploads import Sha256, Upload, upload_view
from app.services import url_imports
from app.storage import get_staging
from app.threads import NAMES

router = APIRouter(prefix="/imports", tags=["uploads"], route_class=IdempotentRoute)


class CreateImport(RequestBody):
    """A file to fetch."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"url": "https://example.org/models/tiny.zip"}]}
    )

    url: Annotated[
        str, StringConstraints(min_length=1, max_length=4000, strip_whitespace=True, pattern=TEXT_PATTERN)
    ] = Field(json_schema_extra={"format": "uri"})
    """An `https://` URL on the open internet, or in a network that the administrator allows. It may be signed; it must
    lead to the file itself, since redirects are not followed."""
    sha256: Sha256 | None = None
    """sha256 of the file in hex. Give it: the import fails when other bytes come."""
    name: FileName | None = None
    """The file's name; left out: the end of the URL's path. Its ending is only a hint."""


async def checked(body: CreateImport, settings: CurrentSettings) -> CreateImport:
    """The body once its URL was looked at, which takes as long as its name's server: before there is a transaction."""
    await NAMES.run(url_imports.check_source, body.url, settings)
    return body


@router.post(
    "",
    operation_id="create_import",
    status_code=202,
    summary="Import a file by URL",
    responses=problem_responses(507),
)
def create_import(
    body: Annotated[CreateImport, Depends(checked)],
    session: WriteSession,
    settings: CurrentSettings,
    response: Response,
) -> Upload:
    """Have the service fetch a file, over broken connections and restarts. The answer is an upload: poll it until it is
    `completed` or `failed`, then make a model or a dataset of it. `DELETE` it to stop.
    """
    state = url_imports.create_import(
        session, get_staging(), settings, url=body.url, name=body.name, sha256=body.sha256
    )
    shown = upload_view(state)
    response.headers["Location"] = shown.urls.self
    return shown
