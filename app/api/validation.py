"""Turn pydantic's list of errors into faults a person can act on: where, what, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from app.api.bodies import FILE_NAME_PATTERN
from app.api.texts import ID_PATTERN, LABEL_FILTER_PATTERN, NAME_PATTERN, TEXT_PATTERN
from app.errors import Fault, InvalidRequest, ModelpressError
from app.spec.compression import STEP_CLASSES, Acceptance, CompressionSpec, Evaluation, Resources, TextSource
from app.spec.distill import StudentFromDepthCut, StudentFromModel, TrainingGrid
from app.spec.export import Export
from app.spec.quantize import LayerOverride

_PREFIX = re.compile(r"^(?P<path>[a-z_]+(?:/[a-z0-9_]+)+): (?P<rest>.+)$", re.DOTALL)
_ID_OF_A_KIND = re.compile(r"^\^(?P<prefix>[a-z]{3}_)\[0-9a-z\]")
_PATTERNS_IN_WORDS = {
    FILE_NAME_PATTERN: "be a file's name without a path",
    ID_PATTERN: "be an id",
    LABEL_FILTER_PATTERN: "be written name:value",
    NAME_PATTERN: "be a name, without NUL characters",
    TEXT_PATTERN: "hold no NUL characters",
}
_LONGEST_ECHO = 60
_RULES_OF_NUMBERS = {"multiple_of", "greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_PLURALS = {1: "1 fault"}


class MalformedBody(InvalidRequest):
    """The body cannot be read as what its content type says."""

    status = 400
    default_code = "malformed_body"
    title = "Malformed body"


def validation_problem(error: RequestValidationError) -> ModelpressError:
    """The problem for a request that does not fit the schema of its route."""
    errors = error.errors()
    if any(item["type"] == "json_invalid" for item in errors):
        reason = errors[0].get("ctx", {}).get("error", "")
        return MalformedBody(
            f"The body is not JSON: {reason} at character {errors[0]['loc'][-1]}.",
            hint="Check quotes and commas; strings and names take double quotes.",
        )
    return problem_of(faults_of(errors, error.body))


def problem_of(faults: Sequence[Fault]) -> InvalidRequest:
    """The problem for a request that has these faults."""
    count = _PLURALS.get(len(faults), f"{len(faults)} faults")
    return InvalidRequest(f"The request has {count}; see `errors`.", faults=faults)


def faults_of(errors: Iterable[Any], body: Any) -> list[Fault]:
    """Faults for the errors of a request with this body."""
    faults: dict[Fault, None] = {}
    items = list(errors)
    # A number of the right kind that breaks a rule need not become one of the words that may stand there too.
    numbers = {_place(item) for item in items if item["type"] in _RULES_OF_NUMBERS}
    for item in items:
        if _is_echo(item) or (_is_word_of_union(item) and _place(item) in numbers):
            continue
        place, *rest = item["loc"] or ("body",)
        if place in ("query", "path", "header", "cookie"):
            pointer = "/".join(map(str, item["loc"]))
        else:
            pointer = _pointer(rest, body, absent=item["type"] == "missing")
        tail, detail = _explain(item)
        faults[Fault(pointer + tail, detail)] = None
    return list(faults)


def _place(item: Any) -> tuple[int | str, ...]:
    """Where an error is, without the member of a union that pydantic tried last."""
    return tuple(item["loc"][:-1])


def _is_word_of_union(item: Any) -> bool:
    return bool(item["loc"]) and str(item["loc"][-1]).startswith("literal[")


def _is_echo(item: Any) -> bool:
    """Pydantic calls a list too short whose items are there and wrong: they are told of one by one."""
    return bool(item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"])


def _pointer(loc: Sequence[int | str], value: Any, *, absent: bool) -> str:
    """A JSON pointer, by walking the body: pydantic also names the chosen member of a union, which is in no body.

    `absent`: the last part names a field that should be there and is not.
    """
    parts: list[str] = []
    for position, part in enumerate(loc):
        if _has(value, part):
            value = value[part]
        elif not (absent and position == len(loc) - 1):
            continue
        parts.append(escaped(str(part)))
    return "".join(f"/{part}" for part in parts)


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def _has(value: Any, part: int | str) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _explain(item: Any) -> tuple[str, str]:
    """(rest of the pointer, detail) of one error."""
    explain = _EXPLANATIONS.get(item["type"])
    return explain(item) if explain else ("", _reworded(item))


def _missing(_: Any) -> tuple[str, str]:
    return "", "This field is required."


def _extra(item: Any) -> tuple[str, str]:
    *parents, name = item["loc"]
    parent = next((part for part in reversed(parents) if isinstance(part, str)), "body")
    if parent == "body" and name in CompressionSpec.model_fields:
        return "", "There is no such field here: it belongs inside `spec`."
    return "", "There is no such field here." + did_you_mean(str(name), _fields_of().get(parent, ()))


def _literal(item: Any) -> tuple[str, str]:
    return "", f"Must be {item['ctx']['expected']}; got {item['input']!r}."


def _unknown_tag(item: Any) -> tuple[str, str]:
    choices = [choice.strip(" '") for choice in item["ctx"]["expected_tags"].split(",")]
    guess = did_you_mean(item["ctx"]["tag"], choices)
    return "/" + item["ctx"]["discriminator"].strip("'"), f"Must be one of {', '.join(choices)}.{guess}"


def _no_tag(item: Any) -> tuple[str, str]:
    return "/" + item["ctx"]["discriminator"].strip(
        "'"
    ), "This field is required: it says which kind this is."


def _not_an_object(item: Any) -> tuple[str, str]:
    """A body under another content type arrives as bytes: `curl -d` without `-H` is the usual way to get here."""
    untold = isinstance(item["input"], bytes)
    return "", "Must be a JSON object" + (
        "; send it with `Content-Type: application/json`." if untold else "."
    )


def _pattern(item: Any) -> tuple[str, str]:
    pattern = item["ctx"]["pattern"]
    wanted = _PATTERNS_IN_WORDS.get(pattern, f"match {pattern}")
    if match := _ID_OF_A_KIND.match(pattern):
        wanted = f"be an id that starts with {match['prefix']}"
    return "", f"Must {wanted}; got {_shortened(item['input'])}."


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_ECHO else shown[:_LONGEST_ECHO] + "…"


def _value_error(item: Any) -> tuple[str, str]:
    """Our validators put a path before what they say where the fault is deeper than the object they look at."""
    message = str(item["msg"]).removeprefix("Value error, ")
    match = _PREFIX.match(message)
    return (f"/{match['path']}", match["rest"]) if match else ("", message)


_EXPLANATIONS: dict[str, Callable[[Any], tuple[str, str]]] = {
    "missing": _missing,
    "extra_forbidden": _extra,
    "literal_error": _literal,
    "union_tag_invalid": _unknown_tag,
    "union_tag_not_found": _no_tag,
    "value_error": _value_error,
    "model_attributes_type": _not_an_object,
    "model_type": _not_an_object,
    "string_pattern_mismatch": _pattern,
}


def _reworded(item: Any) -> str:
    got = item.get("input")
    short = isinstance(got, str | int | float | bool) and len(repr(got)) < 60
    message = str(item["msg"]).replace("Input should be", "Must be").replace("Input should", "Must")
    return message + (f"; got {got!r}." if short else ".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to do about a name that is not among those known: to be put behind the sentence that says so."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else " Remove it, or correct its name."


@lru_cache(maxsize=1)
def _fields_of() -> dict[str, list[str]]:
    """The fields of each part of a spec, by the last name pydantic gives its place: to guess what a misspelt one was meant to be."""
    parts: dict[str, type[BaseModel]] = {
        "spec": CompressionSpec, "acceptance": Acceptance, "evaluation": Evaluation, "resources": Resources,
        "text": TextSource, "calibration": TextSource, "training": TextSource, "export": Export,
        "overrides": LayerOverride, "depth_cut": StudentFromDepthCut, "model": StudentFromModel, "for_grid": TrainingGrid,
    }  # fmt: skip
    steps = {cls.model_fields["technique"].default: cls for cls in STEP_CLASSES}
    return {name: list(cls.model_fields) for name, cls in (parts | steps).items()}
