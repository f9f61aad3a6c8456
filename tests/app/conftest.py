"""Models and datasets in the database, for tests of the API that need no bytes behind them; and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from job_support import make_facts, make_image_facts
from key_support import SECRET, MakeKey

from app.access import DEFAULT_TENANT, Role
from app.db.engine import get_database
from app.db.tables import Dataset, Model, ModelFile
from app.ids import new_id
from app.services import keys
from app.settings import Settings, get_settings
from app.spec.base import Family


@pytest.fixture
def add_model(settings: Settings) -> Callable[..., str]:
    """Call with changes to the facts for the id of a model that is in the database alone."""

    def add(family: Family = Family.CAUSAL_LM, *, tenant: str = DEFAULT_TENANT, **changes: Any) -> str:
        make = make_image_facts if family is Family.IMAGE_CLASSIFIER else partial(make_facts, family)
        facts = make(**changes)
        model = Model(
            id=new_id("mdl"),
            name="tiny",
            format=facts.format,
            architecture=facts.architecture,
            family=facts.family,
            parameters=facts.parameters,
            dtype=facts.dtype,
            bytes=facts.weight_bytes + 500,
            sha256="0" * 64,
            facts=facts.model_dump(mode="json"),
            source="upload",
        )
        with get_database().for_tenant(tenant).write() as session:
            session.add(model)
            session.flush()
            session.add(ModelFile(model_id=model.id, path="tokenizer.json", sha256="0" * 64, bytes=2))
        return model.id

    return add


@pytest.fixture
def add_dataset(settings: Settings) -> Callable[..., str]:
    """Call for the id of a dataset that is in the database alone; with facts of images or texts, it is one of those."""

    def add(*, tenant: str = DEFAULT_TENANT, **facts: Any) -> str:
        of_kind = {"texts" if "texts" in facts else "images": facts or None}
        dataset = Dataset(id=new_id("dst"), name="data", format="txt", bytes=3, sha256="1" * 64, **of_kind)
        with get_database().for_tenant(tenant).write() as session:
            session.add(dataset)
        return dataset.id

    return add


@pytest.fixture
def guarded(override_settings: Callable[..., Settings]) -> None:
    """A service that answers nobody without a key."""
    override_settings(anonymous=False, secret_key=SECRET)


@pytest.fixture
def make_key(guarded: None) -> MakeKey:
    """Call for a key; its tenant is made if need be. Use before `any_database`, which goes on from these settings."""

    def make(
        role: Role = Role.ADMINISTRATOR, *, tenant: str = DEFAULT_TENANT, days: float | None = None
    ) -> str:
        with get_database().write() as session:
            keys.ensure_tenant(session, tenant)
        with get_database().for_tenant(tenant).write() as session:
            made = keys.create_key(
                session, get_settings(), name="test", role=role, days=days, created_by="test"
            )
        return made.token

    return make
