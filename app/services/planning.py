"""From what a user asks for to a spec that is known to fit the model and its workers, or a refusal that says why."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.db import model_queries, worker_queries
from app.db.tables import Model
from app.errors import Fault, InvalidRequest, NotFound, UnsupportedForModel
from app.services.compatibility import fitting_spec, read_facts, spec_of_recipe
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts
from app.spec.plan import Plan, nearest_spec, plan_job
from app.spec.recipes import RECIPES, Recipe, RecipeDatasets

GIB = 2**30
NO_GPU = (
    "No worker with a GPU has been seen lately (GET /v1/workers): the job waits until one starts. Cancel it and leave "
    "resources.device out to run it on a CPU."
)


@dataclass(frozen=True)
class Wish:
    """What a user asks for: a model, and either the name of a recipe, on some datasets, or a spec."""

    model_id: str
    recipe: str | None = None
    spec: CompressionSpec | None = None
    datasets: RecipeDatasets | None = None


@dataclass(frozen=True)
class Planned:
    """A wish that can be carried out, or could on a larger worker (`plan.fits` false)."""

    model: Model
    spec: CompressionSpec
    recipe: str | None
    plan: Plan
    nearest: CompressionSpec | None
    """When the plan does not fit: the spec with the fewest changes that does, if there is one."""
    least_memory_bytes: int
    """The peak when the engine narrows as far as it can: a worker with less cannot do it."""

    @property
    def queue(self) -> str:
        """The queue whose workers may take the job."""
        return queue_of(self.spec)


def queue_of(spec: CompressionSpec) -> str:
    """The queue for a spec: `gpu` when it asks for one."""
    return "gpu" if spec.resources.device == "cuda" else "cpu"


def plan_wish(session: Session, wish: Wish) -> Planned:
    """Check a wish against its model and predict what it takes. The model stays until the transaction ends.

    Raises NotFound, InvalidRequest or UnsupportedForModel with the JSON pointer of every fault.
    """
    model = model_queries.get_model_for_use(session, wish.model_id)
    if model is None:
        raise NotFound(f"There is no model {wish.model_id}.", hint="GET /v1/models lists those there are.")
    facts = read_facts(model)
    recipe = None if wish.recipe is None else find_recipe(wish.recipe)
    if recipe is not None:
        spec, students = spec_of_recipe(session, model, facts, recipe, wish.datasets or RecipeDatasets())
    else:
        spec, students = fitting_spec(session, model, facts, wish.spec)
    plan = _plan(session, model, spec, facts, students)
    narrowest = plan_job(spec, facts, students=students, worker_memory=1)
    nearest = None
    if not plan.fits:
        nearest = nearest_spec(spec, facts, students=students, worker_memory=plan.memory_budget)
    return Planned(model, spec, wish.recipe, plan, nearest, narrowest.peak_memory_bytes)


def require_fit(planned: Planned) -> None:
    """Raise UnsupportedForModel (`over_memory_budget`) when the plan needs more memory than the job may use."""
    plan = planned.plan
    if plan.fits or plan.memory_budget is None:
        return
    worst = max(plan.stages, key=lambda stage: stage.peak_memory_bytes)
    needed = plan.peak_memory_bytes
    raise UnsupportedForModel(
        f"The job would need {needed / GIB:.2f} GiB of memory in the stage `{worst.name}`; it may use "
        f"{plan.memory_budget / GIB:.2f} GiB.",
        code="over_memory_budget",
        hint=_way_out(planned),
        faults=[Fault("/spec/resources/memory_budget", f"Must be at least {needed} bytes for this spec.")],
    )


def find_recipe(name: str) -> Recipe:
    """A recipe by name. Raises InvalidRequest."""
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=1)
    guess = f" Did you mean {close[0]}?" if close else ""
    detail = f"There is no recipe {name!r}; there are {', '.join(RECIPES)}.{guess}"
    raise InvalidRequest(detail, code="unknown_recipe", faults=[Fault("/recipe", detail)])


def _way_out(planned: Planned) -> str:
    if planned.nearest is None:
        return (
            "No smaller settings would fit: use a worker with more memory, or raise resources.memory_budget."
        )
    changed = _differences(planned.spec, planned.nearest)
    return f"This spec would fit: the same with {', '.join(changed)}. POST /v1/plans gives it in full."


def _differences(asked: CompressionSpec, nearest: CompressionSpec) -> list[str]:
    """The fields that differ, as `evaluation.sequence_length = 128`."""
    before, after = _flat(asked.model_dump(mode="json")), _flat(nearest.model_dump(mode="json"))
    return [f"{path} = {value}" for path, value in after.items() if before.get(path) != value]


def _flat(value: object, path: str = "") -> dict[str, object]:
    children: dict[str, object] = {}
    if isinstance(value, dict):
        children = {f"{path}.{key}" if path else key: child for key, child in value.items()}
    elif isinstance(value, list):
        children = {f"{path}.{index}": child for index, child in enumerate(value)}
    else:
        return {path: value}
    return {leaf: found for at, child in children.items() for leaf, found in _flat(child, at).items()}


def _plan(
    session: Session, model: Model, spec: CompressionSpec, facts: ModelFacts, students: dict[str, ModelFacts]
) -> Plan:
    """The budget is what the spec asks for, and never more than the largest worker of the queue has."""
    workers = worker_queries.list_serving(session, queue_of(spec))
    largest = max((int(w.hardware["memory_bytes"]) for w in workers), default=None)
    return plan_job(
        spec,
        facts,
        students=students,
        side_file_bytes=max(0, model.bytes - facts.weight_bytes),
        worker_memory=largest,
    )
