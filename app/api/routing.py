"""Where FastAPI would take what it does not know: a query's unknown parameters, and the word `content` for an id."""

from __future__ import annotations

from fastapi import Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute
from starlette.convertors import StringConvertor, register_url_convertor

from app.api.validation import did_you_mean, problem_of
from app.errors import Fault


class _IdConvertor(StringConvertor):
    """Whatever stands there, so that a wrong id is told how ids start, but not the path beside it."""

    regex = "(?!content$)[^/]+"


register_url_convertor("id", _IdConvertor())


def id_path(name: str) -> str:
    """The path of one thing, beside which there is `/content` for raw bodies."""
    return f"/{{{name}:id}}"


async def refuse_unknown_query(request: Request) -> None:
    """A dependency of every route: a misspelt parameter must not be as if it were not there."""
    if not request.url.query:
        return
    route: APIRoute = request.scope["route"]
    known = [p.alias for p in get_flat_params(route.dependant) if isinstance(p.field_info, Query)]
    faults = [
        Fault(f"query/{name}", "There is no such parameter here." + did_you_mean(name, known))
        for name in request.query_params
        if name not in known
    ]
    if faults:
        raise problem_of(faults)
