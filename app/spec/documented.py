"""Docstrings under fields as their descriptions, read only when a JSON Schema is asked for.

Pydantic's own `use_attribute_docstrings` reads the source of every class while it is imported, which took a quarter of
the API's start.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import CoreSchema


class Documented(BaseModel):
    """A model whose JSON Schema describes each field by the docstring under it."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> JsonSchemaValue:
        """Pydantic's schema, with descriptions."""
        produced = handler(schema)
        properties: dict[str, Any] = handler.resolve_ref_schema(produced).get("properties", {})
        for name, text in field_docstrings(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return produced


@lru_cache(maxsize=256)
def field_docstrings(cls: type[BaseModel]) -> dict[str, str]:
    """The docstrings under the fields of a class and its bases, by field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Documented) and base is not Documented:
            found |= _in_source(base)
    return found


def _in_source(cls: type[BaseModel]) -> dict[str, str]:
    # A parametrized generic has no source of its own; what it was made from is among its bases.
    if cls.__pydantic_generic_metadata__["origin"] is not None:
        return {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    if not isinstance(definition, ast.ClassDef):
        return {}
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found
