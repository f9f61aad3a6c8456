"""Does a spec fit a model, its datasets and its student? What the database knows, put to app.spec.compatibility."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.db import model_queries
from app.db.tables import Dataset, Model
from app.errors import Fault, InvalidRequest, UnsupportedForModel
from app.spec.acceptance_checks import applicable_acceptance
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec, TextSource
from app.spec.dataset_checks import DatasetFacts, check_datasets
from app.spec.distill import DistillLogits, StudentFromModel
from app.spec.facts import ModelFacts
from app.spec.image_set import ImageSetFacts
from app.spec.recipes import Recipe, RecipeDatasets
from app.spec.text_set import TextSetFacts
from app.spec.tokenizer_files import check_tokenizer

_IN_RECIPE = {
    "/calibration/dataset": "/datasets/calibration",
    "/training/dataset": "/datasets/training",
    "/evaluation/text/dataset": "/datasets/evaluation",
}
"""Where a recipe is told of a dataset, by its place in a spec."""


def read_facts(model: Model) -> ModelFacts:
    """The facts of a model, as intake wrote them down."""
    return ModelFacts.model_validate(model.facts)


def fitting_spec(
    session: Session, model: Model, facts: ModelFacts, spec: CompressionSpec | None
) -> tuple[CompressionSpec, dict[str, ModelFacts]]:
    """The spec to run, and the facts of uploaded students by id; datasets and students stay until the transaction ends.

    Raises UnsupportedForModel with every fault, pointing into `/spec`.
    """
    if spec is None:
        raise InvalidRequest("Give a recipe or a spec.", faults=[Fault("", "Give `recipe` or `spec`.")])
    students, missing = _students(session, spec)
    unknown, sets = _datasets(session, spec)
    faults = [
        *missing,
        *unknown,
        *check_spec(spec, facts, students),
        *check_datasets(spec, facts, sets),
        *check_tokenizer(spec, facts, _files_of(session, model)),
    ]
    _refuse(facts, [Fault("/spec" + fault.pointer, fault.detail) for fault in faults])
    return spec, students


def spec_of_recipe(
    session: Session, model: Model, facts: ModelFacts, recipe: Recipe, datasets: RecipeDatasets
) -> tuple[CompressionSpec, dict[str, ModelFacts]]:
    """The same of a recipe: its spec without the limits that are meant for other families, and no students.

    Raises UnsupportedForModel with every fault, pointing at `/recipe` or into `/datasets`.
    """
    if facts.family not in recipe.families:
        served = " and ".join(sorted(recipe.families))
        _refuse(facts, [Fault("/recipe", f"{recipe.name} is for {served} models.")])
    limits = applicable_acceptance(recipe.spec.acceptance, facts)
    spec = recipe.on(datasets).model_copy(update={"acceptance": limits})
    faults = [*check_spec(spec, facts), *check_tokenizer(spec, facts, _files_of(session, model))]
    _refuse(facts, [Fault("/recipe", f"{f.pointer}: {f.detail}") for f in faults])
    unknown, sets = _datasets(session, spec)
    found = [*unknown, *check_datasets(spec, facts, sets)]
    _refuse(facts, [Fault(_IN_RECIPE.get(f.pointer, "/recipe"), f.detail) for f in found])
    return spec, {}


def _files_of(session: Session, model: Model) -> set[str]:
    return {file.path for file in model_queries.list_model_files(session, model.id)}


def _refuse(facts: ModelFacts, faults: list[Fault]) -> None:
    if faults:
        raise UnsupportedForModel(
            f"This cannot be done to this {facts.architecture}: {faults[0].detail}",
            hint="Each entry of `errors` says where and what would work.",
            faults=faults,
        )


def _students(session: Session, spec: CompressionSpec) -> tuple[dict[str, ModelFacts], list[Fault]]:
    students: dict[str, ModelFacts] = {}
    missing: list[Fault] = []
    for number, step in enumerate(spec.steps):
        if isinstance(step, DistillLogits) and isinstance(step.student, StudentFromModel):
            model_id = step.student.model
            student = model_queries.get_model_for_use(session, model_id)
            if student is None:
                missing.append(Fault(f"/steps/{number}/student/model", f"There is no model {model_id}."))
            else:
                students[model_id] = read_facts(student)
    return students, missing


def _datasets(session: Session, spec: CompressionSpec) -> tuple[list[Fault], dict[str, DatasetFacts]]:
    """What is known of the datasets by id.

    Every one that is named must exist, also one that no step reads: a name that leads nowhere is a mistake.
    """
    missing: list[Fault] = []
    sets: dict[str, DatasetFacts] = {}
    named: dict[str, TextSource] = {
        "/calibration/dataset": spec.calibration,
        "/training/dataset": spec.training,
        "/evaluation/text/dataset": spec.evaluation.text,
    }
    for pointer, source in named.items():
        if source.dataset is None:
            continue
        found = model_queries.get_dataset_for_use(session, source.dataset)
        if found is None:
            missing.append(Fault(pointer, f"There is no dataset {source.dataset}."))
        else:
            sets[source.dataset] = _dataset_facts(found)
    return missing, sets


def _dataset_facts(dataset: Dataset) -> DatasetFacts:
    if dataset.images is not None:
        return ImageSetFacts.model_validate(dataset.images)
    return None if dataset.texts is None else TextSetFacts.model_validate(dataset.texts)
