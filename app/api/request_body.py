"""Bodies of requests. JSON has types of its own, so no word is taken for a number, as pydantic would, nor `true` for 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from app.spec.documented import Documented

_ERRORS = {bool: "bool_type", int: "int_type", float: "float_type"}


class RequestBody(Documented):
    """A body whose numbers must come as numbers, and whose `true` and `false` as these, however deep they lie."""

    @model_validator(mode="wrap")
    @classmethod
    def _as_it_was_sent(cls, sent: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        body = read(sent)
        mistaken = list(_mistaken(sent, body, ()))
        if mistaken:
            raise ValidationError.from_exception_data(cls.__name__, mistaken)
        return body


def _mistaken(sent: Any, read: Any, loc: tuple[int | str, ...]) -> Iterator[InitErrorDetails]:
    """Where what was read is of another type than what was sent."""
    if isinstance(sent, dict):
        for name, value in sent.items():
            below = read.get(name) if isinstance(read, dict) else getattr(read, name, None)
            yield from _mistaken(value, below, (*loc, name))
    elif isinstance(sent, list) and isinstance(read, list | tuple):
        for position, (value, below) in enumerate(zip(sent, read, strict=True)):
            yield from _mistaken(value, below, (*loc, position))
    elif _is_mistaken(sent, read):
        yield InitErrorDetails(type=_ERRORS[type(read)], loc=loc, input=sent)


def _is_mistaken(sent: Any, read: Any) -> bool:
    """4.0 is an integer in JSON; "4" and true are none, and neither 1 nor "yes" is true."""
    if type(read) is bool:
        return type(sent) is not bool
    return type(read) in _ERRORS and isinstance(sent, bool | str)
