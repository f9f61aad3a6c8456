"""A spec with anything at all in any of its places is valid or has faults; it never breaks what reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from app.spec.base import Step
from app.spec.compression import STEP_CLASSES, CompressionSpec

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "a\0b", "\ud800", [], [[]], [None], {}, {"a": []},
)  # fmt: skip


def places(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """The fields of an object, by its JSON Schema."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    yield from schema.get("properties", ())


def read(spec: dict[str, Any]) -> bool:
    """Whether the spec is valid."""
    try:
        CompressionSpec.model_validate(spec)
    except ValidationError as error:
        # What is made of the faults reads them too.
        return not error.errors()
    return True


@pytest.mark.parametrize("step", STEP_CLASSES, ids=lambda step: step.__name__)
def test_a_step_takes_anything_in_its_fields_or_refuses_it(step: type[Step]) -> None:
    technique = step.model_fields["technique"].default
    for field in step.model_fields:
        for value in VALUES:
            read({"steps": [{"technique": technique, field: value}]})


def test_a_spec_takes_anything_in_its_fields_or_refuses_it() -> None:
    schema = CompressionSpec.model_json_schema()
    valid = {"steps": [{"technique": "quantize.weights"}]}
    assert read(valid)
    for field, about in schema["properties"].items():
        for value in VALUES:
            read(valid | {field: value})
            for inner in places(about, schema["$defs"]):
                read(valid | {field: {inner: value}})
