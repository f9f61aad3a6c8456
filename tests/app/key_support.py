"""Calls with keys, for tests of who may do what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fastapi.testclient import TestClient

SECRET = "s" * 32
MakeKey = Callable[..., str]


def bearer(token: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {token}"}


def operations(client: TestClient, ids: Mapping[str, str] | None = None) -> Iterator[tuple[str, str, str]]:
    """(operation id, method, path) of everything in the OpenAPI document; the path has these ids, else those of the examples."""
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            filled = path
            for parameter in operation.get("parameters", ()):
                value = (ids or {}).get(parameter["name"], parameter.get("example"))
                filled = filled.replace(f"{{{parameter['name']}}}", str(value))
            yield operation["operationId"], method.upper(), filled
