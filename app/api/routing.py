"""Where FastAPI would take what it does not know: unknown parameters, unknown fields, and the word `content` for an id."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fastapi import Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute
from starlette.convertors import StringConvertor, register_url_convertor

from app.api.validation import did_you_mean, escaped, problem_of
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
    _refuse_others(request.query_params, known, "query/{}", "There is no such parameter here.")


async def refuse_unknown_fields(request: Request) -> None:
    """A dependency of routes that take a form: as unknown fields of JSON are refused."""
    route: APIRoute = request.scope["route"]
    known = [field.alias for field in route.dependant.body_params]
    _refuse_others(await request.form(), known, "/{}", "There is no such field here.")


def _refuse_others(given: Iterable[str], known: Collection[str], place: str, detail: str) -> None:
    """Raise InvalidRequest with a fault for each name that is not known."""
    faults = [
        Fault(place.format(escaped(name)), detail + did_you_mean(name, known))
        for name in given
        if name not in known
    ]
    if faults:
        raise problem_of(faults)
