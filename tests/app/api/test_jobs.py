"""Jobs over HTTP: refused at submit when they cannot be done, listed, stopped, retried and deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish, make_facts

from app.db import job_claims, job_moves, worker_queries
from app.db.engine import Database
from app.settings import Settings
from app.spec.base import Family
from app.spec.facts import TensorFact
from app.storage import get_store

AddModel = Callable[..., str]
FILES = {
    "model.safetensors": ("model", b"w" * 3000),
    "config.json": ("model", b"{}"),
    "report.json": ("report", b'{"version": 1}'),
    "report.html": ("report_html", b"<html>"),
}
INT8 = {"steps": [{"technique": "quantize.weights", "bits": 8}]}


def submit(client: TestClient, model: str, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={"model": model, "recipe": "int8"} | body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def refused(client: TestClient, model: str, spec: dict[str, Any]) -> dict[str, str]:
    answer = client.post("/v1/jobs", json={"model": model, "spec": spec})
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] == "unsupported_for_model"
    return {fault["pointer"]: fault["detail"] for fault in answer.json()["errors"]}


def one_step(technique: str, **parameters: Any) -> dict[str, Any]:
    return {"steps": [{"technique": technique, **parameters}]}


def test_a_job_is_accepted_with_its_stages_and_first_event(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    answer = client.post("/v1/jobs", json={"model": model, "spec": INT8, "name": "try", "labels": {"a": "b"}})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == job["urls"]["self"] == f"/v1/jobs/{job['id']}"
    assert client.get(answer.headers["location"]).json() | {"durations": 0} == job | {"durations": 0}
    assert (job["status"], job["model"], job["name"], job["labels"]) == ("queued", model, "try", {"a": "b"})
    assert [stage["name"] for stage in job["stages"]] == [
        "load", "baseline", "step 1: quantize.weights", "export", "verify", "report",
    ]  # fmt: skip
    events = client.get(job["urls"]["events"]).json()["items"]
    assert [(e["number"], e["type"], e["data"]) for e in events] == [(1, "status", {"status": "queued"})]


def test_the_spec_of_a_job_has_every_default_written_out(client: TestClient, add_model: AddModel) -> None:
    job = submit(client, add_model(), recipe=None, spec=INT8)
    assert job["spec"]["steps"][0] == {
        "technique": "quantize.weights", "bits": 8, "group_size": None, "double_quantized": False,
        "symmetric": True, "scale_search": "mse",
        "number_format": "int", "activations": "none", "ignore": [], "overrides": [], "include_head": False,
    }  # fmt: skip
    assert job["spec"]["evaluation"]["tokens"] == 4096


def test_a_job_is_accepted_while_the_broker_is_away_and_left_to_the_sweeper(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    with any_database.write() as session:
        assert job_moves.take_undispatched(session, stale_seconds=3600) == [(job["id"], "cpu")]


def test_a_job_is_sent_to_the_broker_after_its_commit(
    override_settings: Callable[..., Settings], valkey: Any, request: pytest.FixtureRequest
) -> None:
    import redis

    override_settings(redis_url=valkey.url)
    client, add_model = request.getfixturevalue("client"), request.getfixturevalue("add_model")
    job = submit(client, add_model())
    broker = redis.Redis.from_url(valkey.url)
    assert job["id"].encode() in broker.lindex("cpu", 0)  # type: ignore[operator]
    broker.close()


def test_limits_of_a_recipe_that_are_for_other_families_are_left_out(
    client: TestClient, add_model: AddModel
) -> None:
    assert submit(client, add_model())["spec"]["acceptance"]["min_cosine"] is None
    encoder = submit(client, add_model(Family.ENCODER))["spec"]["acceptance"]
    assert (encoder["min_cosine"], encoder["max_perplexity_increase"]) == (0.99, None)


def test_a_cuda_job_waits_in_the_gpu_queue_and_says_so_where_nobody_serves_it(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    spec = one_step("quantize.weights") | {"resources": {"device": "cuda"}}
    with database.write() as session:
        worker_queries.announce(
            session, "w0", queues="cpu", hardware={"memory_bytes": 2**40}, sandbox="process"
        )
    job = submit(client, add_model(), recipe=None, spec=spec)
    assert job["queue"] == "gpu"
    assert "No worker with a GPU" in job["warnings"][0]
    with database.write() as session:
        worker_queries.announce(
            session, "w1", queues="cpu,gpu", hardware={"memory_bytes": 2**40}, sandbox="process"
        )
    assert submit(client, add_model(), recipe=None, spec=spec)["warnings"] == []


def test_an_unknown_model_is_404(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json={"model": "mdl_0", "recipe": "int8"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_an_unknown_recipe_is_told_what_it_may_have_meant(client: TestClient, add_model: AddModel) -> None:
    answer = client.post("/v1/jobs", json={"model": add_model(), "recipe": "int88"})
    assert answer.status_code == 422
    assert "Did you mean int8?" in answer.json()["errors"][0]["detail"]


def test_a_group_size_that_does_not_divide_names_layers_and_a_size_that_works(
    client: TestClient, add_model: AddModel
) -> None:
    found = refused(client, add_model(), one_step("quantize.weights", group_size=48))
    assert "model.layers.0.self_attn.q_proj (64)" in found["/spec/steps/0/group_size"]
    assert "64 works" in found["/spec/steps/0/group_size"]


def test_ignored_layers_do_not_have_to_fit_the_group_size(client: TestClient, add_model: AddModel) -> None:
    spec = one_step("quantize.weights", group_size=128, ignore=["*q_proj", "*o_proj", "*up_proj"])
    submit(client, add_model(), recipe=None, spec=spec)


def test_an_ignore_pattern_that_matches_nothing_is_refused(client: TestClient, add_model: AddModel) -> None:
    found = refused(client, add_model(), one_step("quantize.weights", ignore=["*q_proj", "*qproj"]))
    assert set(found) == {"/spec/steps/0/ignore/1"}


def test_ignoring_every_layer_is_refused(client: TestClient, add_model: AddModel) -> None:
    found = refused(client, add_model(), one_step("prune.magnitude", ignore=["*"]))
    assert set(found) == {"/spec/steps/0/ignore"}


def test_removing_every_block_is_refused(client: TestClient, add_model: AddModel) -> None:
    found = refused(client, add_model(), one_step("prune.depth", drop_blocks=4))
    assert "3 at most" in found["/spec/steps/0/drop_blocks"]


def test_blocks_removed_before_count_against_the_next_step(client: TestClient, add_model: AddModel) -> None:
    step = {"technique": "prune.depth", "drop_blocks": 2}
    assert set(refused(client, add_model(), {"steps": [step, step]})) == {"/spec/steps/1/drop_blocks"}


def test_two_of_four_needs_inputs_divisible_by_four(client: TestClient, add_model: AddModel) -> None:
    odd = TensorFact(name="model.layers.0.odd.weight", dtype="BF16", shape=(8, 6))
    model = add_model(tensors=(*make_facts().tensors, odd))
    found = refused(client, model, one_step("prune.magnitude", pattern="2:4"))
    assert "model.layers.0.odd (6)" in found["/spec/steps/0/pattern"]


def test_a_model_that_is_already_quantized_is_refused(client: TestClient, add_model: AddModel) -> None:
    packed = TensorFact(name="model.layers.0.mlp.weight", dtype="I32", shape=(8, 8))
    found = refused(client, add_model(tensors=(packed,)), one_step("quantize.weights"))
    assert "already compressed" in found["/spec/steps/0/technique"]


def test_onnx_quantization_of_an_encoder_has_no_head_and_ignores_layers_by_name(
    client: TestClient, add_model: AddModel
) -> None:
    encoder = add_model(Family.ENCODER)
    found = refused(client, encoder, one_step("quantize.onnx", quantize_head=True, ignore=["*nothing"]))
    assert set(found) == {"/spec/steps/0/quantize_head", "/spec/steps/0/ignore/0"}
    submit(client, encoder, recipe=None, spec=one_step("quantize.onnx", block_size=256))


def test_longer_sequences_than_the_model_takes_are_refused(client: TestClient, add_model: AddModel) -> None:
    found = refused(client, add_model(), one_step("distill.logits", sequence_length=256))
    assert "128 tokens" in found["/spec/steps/0/sequence_length"]


def test_a_student_must_share_the_vocabulary_of_its_teacher(client: TestClient, add_model: AddModel) -> None:
    def spec(student: str) -> dict[str, Any]:
        source = {"source": "model", "model": student}
        return one_step("distill.logits", sequence_length=64, student=source)

    teacher = add_model()
    assert (
        "vocabulary has 100"
        in refused(client, teacher, spec(add_model(vocab_size=100)))["/spec/steps/0/student/model"]
    )
    assert "no model mdl_9" in refused(client, teacher, spec("mdl_9"))["/spec/steps/0/student/model"]
    submit(client, teacher, recipe=None, spec=spec(add_model()))


def test_only_next_tokens_are_cached(client: TestClient, add_model: AddModel) -> None:
    spec = one_step("distill.logits", sequence_length=64, cached_logits=8)
    assert (
        "language models" in refused(client, add_model(Family.ENCODER), spec)["/spec/steps/0/cached_logits"]
    )
    submit(client, add_model(), recipe=None, spec=spec)
    both = one_step("distill.logits", sequence_length=64, cached_logits=8, hidden_weight=1.0)
    answer = client.post("/v1/jobs", json={"model": add_model(), "spec": both})
    assert answer.status_code == 422
    assert "outputs alone" in answer.text


def test_a_grid_to_train_for_must_fit_the_layers(client: TestClient, add_model: AddModel) -> None:
    def spec(**changes: Any) -> dict[str, Any]:
        grid = {"bits": 4, "group_size": 24}
        return one_step(
            "distill.logits",
            sequence_length=64,
            **({"student": {"source": "teacher"}, "for_grid": grid} | changes),
        )

    assert "does not divide" in refused(client, add_model(), spec())["/spec/steps/0/for_grid/group_size"]
    submit(client, add_model(), recipe=None, spec=spec(for_grid={"bits": 4, "group_size": 32}))
    for changes, words in (
        ({"for_grid": None}, "nothing to learn"),
        ({"lora_rank": 4}, "leave out lora_rank"),
    ):
        answer = client.post("/v1/jobs", json={"model": add_model(), "spec": spec(**changes)})
        assert answer.status_code == 422
        assert words in answer.text


def test_relations_are_not_taken_from_a_layer_that_makes_all_three(
    client: TestClient, add_model: AddModel
) -> None:
    spec = one_step("distill.logits", sequence_length=64, relation_weight=1.0)
    stem = "model.layers.0.self_attn"

    def model(*names: str) -> str:
        return add_model(
            tensors=tuple(TensorFact(name=f"{stem}.{n}.weight", dtype="BF16", shape=(64, 64)) for n in names)
        )

    assert "hidden_weight works" in refused(client, model("qkv_proj"), spec)["/spec/steps/0/relation_weight"]
    submit(client, model("q_proj", "k_proj", "v_proj"), recipe=None, spec=spec)


@pytest.mark.parametrize(
    ("family", "limit"),
    [(Family.CAUSAL_LM, "min_cosine"), (Family.ENCODER, "max_kl"), (Family.ENCODER, "min_top1_agreement")],
)
def test_a_limit_that_means_nothing_for_the_family_is_refused(
    client: TestClient, add_model: AddModel, family: Family, limit: str
) -> None:
    spec = one_step("quantize.weights") | {"acceptance": {limit: 0.5}}
    assert set(refused(client, add_model(family), spec)) == {f"/spec/acceptance/{limit}"}


def test_a_limit_on_what_is_not_measured_is_refused(client: TestClient, add_model: AddModel) -> None:
    spec = one_step("quantize.weights") | {"acceptance": {"max_kl": 1}, "evaluation": {"enabled": False}}
    assert set(refused(client, add_model(), spec)) == {"/spec/acceptance/max_kl"}


def test_a_dataset_must_exist(
    client: TestClient, add_model: AddModel, add_dataset: Callable[[], str]
) -> None:
    def spec(dataset: str) -> dict[str, Any]:
        return one_step("quantize.weights") | {"evaluation": {"text": {"dataset": dataset}}}

    model = add_model()
    assert set(refused(client, model, spec("dst_0"))) == {"/spec/evaluation/text/dataset"}
    submit(client, model, recipe=None, spec=spec(add_dataset()))


def test_a_job_over_its_memory_budget_is_refused_with_numbers_and_a_way_out(
    client: TestClient, add_model: AddModel
) -> None:
    spec = one_step("quantize.weights") | {"resources": {"memory_budget": 800 * 2**20}}
    answer = client.post("/v1/jobs", json={"model": add_model(vocab_size=100_000), "spec": spec})
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["code"] == "over_memory_budget"
    assert "0.78 GiB" in problem["detail"]
    assert "evaluation" in problem["hint"]


def test_jobs_are_listed_newest_first_in_pages(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    ids = [submit(client, model)["id"] for _ in range(3)]
    first = client.get("/v1/jobs", params={"limit": 2}).json()
    assert ([j["id"] for j in first["items"]], first["has_more"]) == (ids[:0:-1], True)
    rest = client.get("/v1/jobs", params={"limit": 2, "after": ids[1]}).json()
    assert ([j["id"] for j in rest["items"]], rest["has_more"]) == (ids[:1], False)
    assert len(rest["items"][0]["stages"]) == 6


def test_lists_can_be_narrowed_by_status_model_and_labels(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    one, two = add_model(), add_model()
    red = submit(client, one, labels={"colour": "red", "a.b/c": "1"})["id"]
    blue = submit(client, two, labels={"colour": "blue"})["id"]
    claim(any_database, blue)

    def ids(**params: Any) -> list[str]:
        answer = client.get("/v1/jobs", params=params)
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["items"]]

    assert ids(status="queued") == [red]
    assert ids(status="running") == [blue]
    assert ids(model=two) == [blue]
    assert ids(label="colour:red") == [red]
    assert ids(label=["colour:red", "a.b/c:1"]) == [red]
    assert ids(label=["colour:blue", "a.b/c:1"]) == []
    client.post(f"/v1/jobs/{blue}/cancel")
    assert (ids(status="running"), ids(status="cancelling")) == ([], [blue])


def test_a_queued_job_is_cancelled_at_once_and_a_second_time_changes_nothing(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    first = client.post(job["urls"]["cancel"]).json()
    assert (first["status"], first["ended_at"] is not None) == ("cancelled", True)
    again = client.post(job["urls"]["cancel"])
    assert (again.status_code, again.json()["ended_at"]) == (200, first["ended_at"])
    assert len(client.get(job["urls"]["events"]).json()["items"]) == 2


def test_a_running_job_is_cancelling_until_its_worker_has_stopped(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    taken = claim(any_database, job["id"])
    for _ in range(2):
        assert client.post(job["urls"]["cancel"]).json()["status"] == "cancelling"
    with any_database.write() as session:
        assert job_claims.end_cancelled(session, taken)
    assert client.get(job["urls"]["self"]).json()["status"] == "cancelled"
    assert len(client.get(job["urls"]["events"]).json()["items"]) == 4


def test_training_is_ended_at_its_best_and_the_job_runs_on(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model(), recipe=None, spec={"steps": [{"technique": "distill.logits"}]})
    best = {"keep_best": True}
    queued = client.post(job["urls"]["cancel"], json=best)
    assert (queued.status_code, queued.json()["code"]) == (409, "job_not_running")
    taken = claim(any_database, job["id"])
    for _ in range(2):
        assert client.post(job["urls"]["cancel"], json=best).json()["status"] == "running"
    with any_database.read() as session:
        assert job_claims.requests(session, job["id"]) == (False, True)
    events = client.get(job["urls"]["events"]).json()["items"]
    assert [e["data"].get("training") for e in events if e["type"] == "status"] == [None, None, "stopping"]
    with any_database.write() as session:
        for number, name in enumerate(("load", "baseline", "step 1: distill.logits")):
            assert job_claims.commit_stage(session, taken, number, name, {})
    late = client.post(job["urls"]["cancel"], json=best)
    assert (late.status_code, late.json()["code"]) == (409, "nothing_to_train")
    assert client.post(job["urls"]["cancel"]).json()["status"] == "cancelling"


def test_a_job_that_never_trains_has_no_best_state(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    claim(database, job["id"])
    answer = client.post(job["urls"]["cancel"], json={"keep_best": True})
    assert (answer.status_code, answer.json()["code"]) == (409, "nothing_to_train")


def test_a_job_that_has_ended_cannot_be_cancelled(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    finish(database, claim(database, job["id"]), FILES)
    answer = client.post(job["urls"]["cancel"])
    assert (answer.status_code, answer.json()["code"]) == (409, "job_ended")


def test_a_failed_job_shows_its_error_and_can_be_retried(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    assert client.post(job["urls"]["retry"]).json()["code"] == "job_not_retryable"
    error = {"code": "out_of_memory", "detail": "Memory ran out.", "hint": "Less.", "stage": "load"}
    with any_database.write() as session:
        job_claims.fail(session, claim_in(session, job["id"]), error)
    failed = client.get(job["urls"]["self"]).json()
    assert (failed["status"], failed["error"]) == ("failed", error)
    result = client.get(job["urls"]["result"])
    assert (result.status_code, result.json()["code"], result.json()["hint"]) == (
        409,
        "out_of_memory",
        "Less.",
    )
    retried = client.post(job["urls"]["retry"])
    assert (retried.status_code, retried.json()["status"], retried.json()["error"]) == (202, "queued", None)
    assert retried.json()["durations"]["total"] < 5
    assert (retried.json()["started_at"], retried.json()["durations"]["running"]) == (None, None)


def test_the_stage_a_job_failed_in_is_shown_as_stopped_not_as_running(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    with database.write() as session:
        claim = claim_in(session, job["id"])
        assert job_claims.start_stage(session, claim, 0)
    assert client.get(job["urls"]["self"]).json()["stages"][0]["status"] == "running"
    with database.write() as session:
        job_claims.fail(session, claim, {"code": "out_of_memory", "detail": "Memory ran out."})
    assert client.get(job["urls"]["self"]).json()["stages"][0]["status"] == "stopped"


def claim_in(session: Any, job_id: str) -> job_claims.Claim:
    taken = job_claims.claim_job(session, job_id, owner="test", lease_seconds=60)
    assert taken is not None
    return taken


def test_the_result_is_404_until_there_is_one_and_then_links_every_file(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    early = client.get(job["urls"]["result"])
    assert (early.status_code, early.json()["code"]) == (404, "result_not_ready")
    assert client.get(job["urls"]["report"]).json()["code"] == "report_not_ready"
    finish(any_database, claim(any_database, job["id"]), FILES)
    result = client.get(job["urls"]["result"]).json()
    assert (result["verdict"], result["bytes"]) == ("accepted", 3002)
    assert {a["path"] for a in result["artifacts"]} == set(FILES)
    assert client.get(job["urls"]["self"]).json()["artifacts"] == result["artifacts"]


def test_a_cancelled_job_has_no_result(client: TestClient, add_model: AddModel) -> None:
    job = submit(client, add_model())
    client.post(job["urls"]["cancel"])
    answer = client.get(job["urls"]["result"])
    assert (answer.status_code, answer.json()["code"]) == (409, "job_cancelled")


def test_the_report_is_json_for_programs_and_a_page_for_browsers(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    job = submit(client, add_model())
    finish(database, claim(database, job["id"]), FILES)
    assert client.get(job["urls"]["report"]).json() == {"version": 1}
    browser = client.get(
        job["urls"]["report"], headers={"Accept": "text/html,application/xml;q=0.9,*/*;q=0.8"}
    )
    assert (browser.text, browser.headers["vary"]) == ("<html>", "Accept")
    assert browser.headers["content-type"].startswith("text/html")
    assert browser.headers["content-disposition"].startswith("inline")
    known = client.get(job["urls"]["report"], headers={"If-None-Match": "*"})
    assert (known.status_code, known.headers["vary"]) == (304, "Accept")


def test_a_job_is_deleted_with_its_artifacts_and_blobs_once_it_has_ended(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    job, other = submit(client, model), submit(client, model)
    alive = client.delete(job["urls"]["self"])
    assert (alive.status_code, alive.json()["code"]) == (409, "job_not_ended")
    artifacts = finish(any_database, claim(any_database, job["id"]), FILES)
    finish(any_database, claim(any_database, other["id"]), {"config.json": FILES["config.json"]})
    digests = [client.get(f"/v1/artifacts/{a}").json()["sha256"] for a in artifacts]
    assert client.delete(job["urls"]["self"]).status_code == 204
    assert client.get(job["urls"]["self"]).status_code == 404
    assert client.get(f"/v1/artifacts/{artifacts[0]}").status_code == 404
    assert [get_store().exists(d) for d in digests] == [False, True, False, False]


def test_many_submits_at_once_all_succeed(
    any_database: Database, server_url: str, add_model: AddModel
) -> None:
    """More writers than threads: on SQLite they queue for one lock and must not starve the one that holds it."""
    import asyncio

    import httpx

    model = add_model()

    async def all_at_once() -> list[int]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server_url, limits=limits, timeout=60) as http:
            body = {"model": model, "recipe": "int8"}
            answers = await asyncio.gather(*(http.post("/v1/jobs", json=body) for _ in range(100)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(all_at_once()) == [202] * 100
