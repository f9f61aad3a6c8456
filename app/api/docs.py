"""The documentation pages and the OpenAPI document behind them. No byte of them comes from another server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from app.access import Role
from app.api.authentication import is_open, required_role
from app.api.common_answers import add_common_answers, common_answers
from app.api.problems import Problem
from app.version import VERSION

router = APIRouter(include_in_schema=False)

_STATIC = Path(__file__).parents[1] / "static"
# The pages load nothing from elsewhere. Swagger UI and Redoc write styles into the page; Redoc searches in a worker.
_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; worker-src blob:; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_EXAMPLE_ID = "01k0b6x2v9m4c8d7e5f3g1h0j2"
_PATH_EXAMPLES = {
    "job_id": f"job_{_EXAMPLE_ID}",
    "model_id": f"mdl_{_EXAMPLE_ID}",
    "dataset_id": f"dst_{_EXAMPLE_ID}",
    "artifact_id": f"art_{_EXAMPLE_ID}",
    "upload_id": f"upl_{_EXAMPLE_ID}",
    "key_id": f"key_{_EXAMPLE_ID}",
    "webhook_id": f"whe_{_EXAMPLE_ID}",
    "message_id": f"msg_{_EXAMPLE_ID}",
    "number": 1,
    "path": "config.json",
}

_KEY_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "mp_<id>_<secret>",
    "description": "An API key, as `modelpress keys create` or `POST /v1/keys` showed it.",
}

DESCRIPTION = """
Modelpress makes neural networks smaller and **proves what was gained and what was lost**. You upload a model, post a
job that says what to do (quantize, prune, distill, optimize, export), follow it, and download a smaller model with a
report: size, speed, memory and quality of the original and of the result, measured on the files that were written.

### A round trip in five calls

| | call | |
|---|---|---|
| 1 | `PUT /v1/models/content` | send a model; large ones go up in parts with `POST /v1/uploads` |
| 2 | `POST /v1/jobs` | say what to do: `{"model": "mdl_…", "recipe": "int8"}` |
| 3 | `GET /v1/jobs/{id}/events` | follow it live (`Accept: text/event-stream`), or just ask for the job |
| 4 | `GET /v1/jobs/{id}/report` | read what it did; in a browser it is a page with plots |
| 5 | `GET /v1/jobs/{id}/download` | fetch the result as one tar |

The same with `curl`, in one form: `curl -F file=@model.zip -F recipe=int8 …/v1/compress`.

Not sure what to ask for? `GET /v1/recipes` has presets with their reasons, `GET /v1/techniques` everything a spec may
contain, and `POST /v1/plans` tells what a job would take before you start it.

### Conventions

* Sizes are in bytes, durations in seconds unless the name says otherwise (`median_ms`), times in UTC (RFC 3339).
* Ids carry their kind (`job_…`, `mdl_…`) and sort by time. Lists come newest first, in pages: `limit`, `after`.
* Every error is `application/problem+json` (RFC 9457) with a stable `code`, a `detail` that says what happened, a
  `hint` that says what to do, and for a spec the JSON pointer of each fault.
* What the service does not know it refuses: fields of a body and parameters of a query by name (422), methods of a path
  with those it takes in `Allow` (405).
* Calls carry a key: `Authorization: Bearer mp_…` (**Authorize** puts it in on this page). A service on your own machine
  answers without one, unless it was told not to.
* POST takes `Idempotency-Key`: send the call again with the same key, and nothing is done twice.

On `/docs` the ids in the examples are those of your newest model, dataset and job, once there are some, and of the last
upload you started on the page: press **Execute**.
"""

TAGS = [
    {"name": "models", "description": "What is to be compressed. Facts are read from headers; no code in a file is ever run."},
    {"name": "uploads", "description": "Large files, in parts that may come in any order and be sent again, or fetched from a URL."},
    {"name": "jobs", "description": "What is done to a model: submit, follow, cancel, retry, and fetch the result."},
    {"name": "compress", "description": "A model file and what to do with it in one form, for `curl`."},
    {"name": "plans", "description": "What a job would take, without running it."},
    {"name": "artifacts", "description": "The files jobs leave, with ranges, validators and digests."},
    {"name": "datasets", "description": "Your own text to calibrate, train and evaluate on."},
    {"name": "catalogue", "description": "What can be done, with which presets, into which formats, by which workers."},
    {"name": "keys", "description": "Who may call the service and what they changed, for administrators."},
    {"name": "webhooks", "description": "Be told when jobs start and end, by signed calls to your own server."},
    {"name": "ops", "description": "Health and metrics, for those who run the service."},
]  # fmt: skip


def add_docs(app: FastAPI) -> None:
    """Serve the pages and their assets, and describe the API as it is in `app`."""
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.openapi = lambda: _cached(app)  # type: ignore[method-assign]


@router.get("/")
def get_root() -> RedirectResponse:
    """A person who opens the service wants to know what it is."""
    return RedirectResponse("docs")


@router.get("/docs")
def get_docs() -> FileResponse:
    """Swagger UI."""
    return FileResponse(_STATIC / "docs.html", headers={"Content-Security-Policy": _POLICY})


@router.get("/redoc")
def get_redoc() -> FileResponse:
    """Redoc."""
    return FileResponse(_STATIC / "redoc.html", headers={"Content-Security-Policy": _POLICY})


def _cached(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = _document(app)
    return app.openapi_schema


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title="Modelpress",
        version=VERSION,
        summary="Compress neural networks, and prove what was gained and what was lost.",
        description=DESCRIPTION.strip(),
        routes=app.routes,
        tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    schemas = document["components"]["schemas"]
    schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schemas["Problem"].pop("$defs")
    document["components"]["responses"] = common_answers()
    document["components"]["securitySchemes"] = {"key": _KEY_SCHEME}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _finish(operation)
            add_common_answers(path, operation)
            if not is_open(path):
                _secure(operation, required_role(method.upper(), path))
    return _with_plain_names(document)


def _finish(operation: dict[str, Any]) -> None:
    """Ids to try things out with; what may be left out is not therefore null."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and parameter["name"] in _PATH_EXAMPLES:
            parameter["example"] = _PATH_EXAMPLES[parameter["name"]]
        # Swagger UI fills in a parameter's own example, and not its schema's.
        if parameter["in"] == "query" and parameter.get("required") and "examples" in parameter["schema"]:
            parameter["example"] = parameter["schema"]["examples"][0]
        parameter["schema"] = _without_null(parameter["schema"])


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a parameter as it is sent: in a path, a query or a header there is no null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) != 1:
        return schema
    return {**kinds[0], **{name: value for name, value in schema.items() if name != "anyOf"}}


def _secure(operation: dict[str, Any], role: Role) -> None:
    """Say that a key is needed, and whose."""
    operation["security"] = [{"key": []}]
    operation["description"] += f"\n\nNeeds the role `{role}`."


def _with_plain_names(document: dict[str, Any]) -> dict[str, Any]:
    """`Page[JobView]` is `JobPage` and `JobView` is `Job`: these names become classes in generated clients."""
    schemas = document["components"]["schemas"]
    names = {old: new for old in schemas if (new := _plain_name(old)) not in schemas}
    document["components"]["schemas"] = {
        names.get(name, name): schema | {"title": names.get(name, name)} for name, schema in schemas.items()
    }
    references = {f"#/components/schemas/{old}": f"#/components/schemas/{new}" for old, new in names.items()}
    return dict(_renamed(document, references))


def _plain_name(name: str) -> str:
    """Without FastAPI's underscores and our `View`."""
    if name.startswith("Page_"):
        return name.removeprefix("Page_").removesuffix("_").removesuffix("View") + "Page"
    if name.startswith("Body_"):
        return name.removeprefix("Body_").title().replace("_", "") + "Form"
    return name.removesuffix("View")


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: names.get(v, v) if key == "$ref" else _renamed(v, names) for key, v in value.items()}
    return [_renamed(item, names) for item in value] if isinstance(value, list) else value
