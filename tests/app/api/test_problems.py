"""Every error is a problem that says where, what, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from key_support import bearer, operations

from app.db import job_queries
from app.settings import Settings


def faults(client: TestClient, body: dict[str, Any]) -> dict[str, str]:
    answer = client.post("/v1/jobs", json={"model": "mdl_1"} | body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return {fault["pointer"]: fault["detail"] for fault in answer.json()["errors"]}


def spec_faults(client: TestClient, *steps: dict[str, Any], **spec: Any) -> dict[str, str]:
    return faults(client, {"spec": {"steps": steps} | spec})


def test_an_unknown_path_is_a_problem(client: TestClient) -> None:
    answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "not_found"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_wrong_method_is_a_problem_that_names_the_right_ones(client: TestClient) -> None:
    answer = client.put("/v1/jobs")
    assert answer.status_code == 405
    assert answer.json()["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "GET, POST"
    assert answer.json()["detail"] == "/v1/jobs does not take PUT, but GET, POST."


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_the_path_for_raw_bodies_is_not_taken_for_an_id(client: TestClient, kind: str) -> None:
    for method in ("GET", "DELETE"):
        answer = client.request(method, f"/v1/{kind}/content")
        assert answer.status_code == 405
        assert answer.headers["allow"] == "PUT"


def test_a_request_id_that_is_given_is_kept_and_a_strange_one_is_not(client: TestClient) -> None:
    assert client.get("/v1/health/live", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    strange = client.get("/v1/health/live", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"]
    assert len(strange) == 32


def test_a_fault_in_a_step_is_found_by_its_pointer(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "quantize.weights", "bits": 5})
    assert found == {"/spec/steps/0/bits": "Must be 8, 4, 3 or 2; got 5."}


def test_all_faults_are_told_at_once(client: TestClient) -> None:
    found = spec_faults(
        client,
        {"technique": "prune.magnitude", "sparsity": 2},
        {"technique": "quantize.weights", "group_size": 7, "bits": "x"},
        seed=-1,
    )
    assert set(found) == {
        "/spec/steps/0/sparsity",
        "/spec/steps/1/group_size",
        "/spec/steps/1/bits",
        "/spec/seed",
    }


def test_a_misspelt_field_is_recognised(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "quantize.weights", "group_sise": 32})
    assert found == {"/spec/steps/0/group_sise": "There is no such field here. Did you mean group_size?"}


def test_a_field_of_another_part_is_not_suggested_where_it_does_not_belong(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "prune.depth", "block_size": 32})
    assert "Did you mean" not in found["/spec/steps/0/block_size"]
    answer = client.post("/v1/jobs", json={"model": "mdl_0", "recipe": "int8", "seed": 3})
    assert answer.json()["errors"] == [
        {"pointer": "/seed", "detail": "There is no such field here: it belongs inside `spec`."}
    ]


def test_a_number_that_breaks_a_rule_is_not_told_to_be_a_word(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "quantize.weights", "group_size": 100})
    assert found == {"/spec/steps/0/group_size": "Must be a multiple of 8; got 100."}


@pytest.mark.parametrize("number_format", [{}, []])
def test_a_word_that_is_an_object_or_a_list_is_a_fault_like_any_other(
    client: TestClient, number_format: object
) -> None:
    found = spec_faults(client, {"technique": "quantize.weights", "number_format": number_format})
    assert set(found) == {"/spec/steps/0/number_format"}


def test_a_word_is_no_number_and_a_number_is_not_true(client: TestClient) -> None:
    found = spec_faults(
        client,
        {"technique": "prune.magnitude", "sparsity": "0.5"},
        {
            "technique": "quantize.weights",
            "symmetric": 0,
            "bits": 4.0,
            "overrides": [{"layers": "x", "bits": 8}],
        },
        seed=True,
    )
    assert found == {
        "/spec/steps/0/sparsity": "Must be a valid number; got '0.5'.",
        "/spec/steps/1/symmetric": "Must be a valid boolean; got 0.",
        "/spec/seed": "Must be a valid integer; got True.",
    }
    for path, body in {
        "/v1/uploads": {"name": "n", "size": "5"},
        "/v1/keys": {"name": "k", "role": "reader", "expires_in_days": True},
        "/v1/jobs/job_1/cancel": {"keep_best": 1},
    }.items():
        assert client.post(path, json=body).status_code == 422, path


def test_a_misspelt_technique_is_recognised(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "quantise.weights"})
    assert "Did you mean quantize.weights?" in found["/spec/steps/0/technique"]


def test_a_step_without_technique_says_which_field_is_missing(client: TestClient) -> None:
    assert set(spec_faults(client, {"bits": 4})) == {"/spec/steps/0/technique"}


def test_a_missing_field_inside_a_union_is_found(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "distill.logits", "student": {"source": "model"}})
    assert found == {"/spec/steps/0/student/model": "This field is required."}


def test_a_bad_field_inside_a_union_that_is_called_like_its_tag_is_found(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "distill.logits", "student": {"source": "model", "model": "x"}})
    assert set(found) == {"/spec/steps/0/student/model"}


def test_steps_that_do_not_fit_together_are_found_by_number(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "quantize.weights"}, {"technique": "prune.magnitude"})
    assert set(found) == {"/spec/steps/0"}
    assert "put it last" in found["/spec/steps/0"]


def test_a_step_that_contradicts_itself_is_found(client: TestClient) -> None:
    found = spec_faults(client, {"technique": "prune.depth", "drop_blocks": 1, "drop_ratio": 0.5})
    assert found == {"/spec/steps/0": "give drop_blocks or drop_ratio, not both"}


def test_neither_recipe_nor_spec_is_a_fault_of_the_whole_body(client: TestClient) -> None:
    assert set(faults(client, {})) == {""}


def test_a_slash_in_a_name_is_escaped_in_the_pointer(client: TestClient) -> None:
    assert set(faults(client, {"recipe": "int8", "a/b": 1})) == {"/a~1b"}


def test_a_fault_in_a_query_names_the_parameter(client: TestClient) -> None:
    answer = client.get("/v1/jobs", params={"limit": 0})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == "query/limit"
    assert "pointer" not in answer.json()["errors"][0]


def test_a_misspelt_parameter_of_a_query_is_refused_and_recognised(client: TestClient) -> None:
    answer = client.get("/v1/jobs", params={"limt": 5, "status": "queued", "zzz": ""})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"parameter": "query/limt", "detail": "There is no such parameter here. Did you mean limit?"},
        {
            "parameter": "query/zzz",
            "detail": "There is no such parameter here. Remove it, or correct its name.",
        },
    ]


def test_every_operation_refuses_a_parameter_it_does_not_have(client: TestClient) -> None:
    for name, method, path in operations(client):
        answer = client.request(method, path, params={"no_such_parameter": "1"})
        assert answer.status_code == (200 if name == "get_metrics" else 422), name


def test_a_body_that_is_no_json_is_told_where_it_breaks(client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=b'{"model": }', headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["code"] == "malformed_body"
    assert "character 10" in answer.json()["detail"]


def test_a_body_without_its_content_type_is_told_which_to_send(client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=b'{"model": "mdl_1"}')
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {
            "pointer": "",
            "detail": "Must be a JSON object; send it with `Content-Type: application/json`.",
        }
    ]


def test_a_body_that_is_a_list_is_told_to_be_an_object(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json=[])
    assert answer.json()["errors"] == [{"pointer": "", "detail": "Must be a JSON object."}]


@pytest.mark.parametrize(
    ("path", "prefix"), [("/v1/jobs/nope", "job_"), ("/v1/models/nope", "mdl_"), ("/v1/uploads/nope", "upl_")]
)
def test_an_id_of_another_kind_is_told_how_ids_start(client: TestClient, path: str, prefix: str) -> None:
    (fault,) = client.get(path).json()["errors"]
    assert fault["detail"] == f"Must be an id that starts with {prefix}; got 'nope'."


def test_a_file_name_with_a_path_is_told_so(client: TestClient) -> None:
    (fault,) = client.post("/v1/uploads", json={"name": "../m.gguf", "size": 1}).json()["errors"]
    assert fault["detail"] == "Must be a file's name without a path; got '../m.gguf'."


def test_an_unforeseen_error_gives_an_id_that_is_in_the_log_and_no_traceback(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret of ours")

    monkeypatch.setattr(job_queries, "get_jobs", broken)
    answer = client.get("/v1/jobs/job_1")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert "secret" not in answer.text
    assert answer.json()["error_id"] in caplog.text
    assert "a secret of ours" in caplog.text


def test_a_database_that_does_not_answer_is_a_503_to_try_again(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(database_url="postgresql://nobody@127.0.0.1:1/none")
    client: TestClient = request.getfixturevalue("client")
    # With a key it is the check of the key that finds no database.
    for headers in ({}, bearer(f"mp_{'0' * 26}_{'0' * 52}")):
        answer = client.get("/v1/jobs", headers=headers)
        assert answer.status_code == 503
        assert answer.json()["code"] == "database_unavailable"
        assert answer.headers["retry-after"] == "5"


def test_a_body_over_the_limit_is_refused_by_its_length(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(max_json_bytes=100)
    client: TestClient = request.getfixturevalue("client")
    answer = client.post("/v1/jobs", json={"model": "m" * 100})
    assert answer.status_code == 413
    assert answer.json()["code"] == "payload_too_large"


def test_a_body_over_the_limit_is_refused_when_its_length_is_not_told(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(max_json_bytes=100)
    client: TestClient = request.getfixturevalue("client")
    chunks = iter([b"{" + b" " * 80] * 4)
    answer = client.post("/v1/jobs", content=chunks, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"


def test_adapters_that_would_fill_pruned_zeros_are_refused(client: TestClient) -> None:
    distill = {"technique": "distill.logits", "student": {"source": "previous_step"}, "lora_rank": 8}
    found = spec_faults(client, {"technique": "prune.magnitude"}, distill)
    assert any("fill the zeros" in words for words in found.values())
