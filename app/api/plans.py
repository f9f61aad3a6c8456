"""Plans: what a job would take, without running it."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import ReadSession
from app.api.jobs import JobRequest
from app.api.problems import problem_responses
from app.services.planning import plan_wish
from app.spec.compression import CompressionSpec
from app.spec.documented import Documented
from app.spec.plan import Plan

router = APIRouter(prefix="/plans", tags=["plans"])


class PlanAnswer(Documented):
    """What a job would take. A job whose plan does not fit is refused."""

    model: str
    recipe: str | None
    queue: str
    """The queue the job would wait in."""
    spec: CompressionSpec
    """The spec as it would be run, every default written out."""
    plan: Plan
    nearest_spec: CompressionSpec | None
    """When the plan does not fit: the spec with the fewest changes that does. Null: only more memory helps."""


@router.post("", operation_id="create_plan", summary="Plan a job", responses=problem_responses(404))
def create_plan(body: JobRequest, session: ReadSession) -> PlanAnswer:
    """Takes the body of a job; predicts peak memory, disk, time and output bytes. Nothing is kept.

    Output bytes are exact to 1 % for everything that writes safetensors; time is right to a factor of about three.
    """
    planned = plan_wish(session, body.wish())
    return PlanAnswer(
        model=planned.model.id,
        recipe=planned.recipe,
        queue=planned.queue,
        spec=planned.spec,
        plan=planned.plan,
        nearest_spec=planned.nearest,
    )
