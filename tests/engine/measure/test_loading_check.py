from __future__ import annotations

from typing import Any

import pytest
from made_up import runner_facts

from app.errors import VerificationFailed
from workers.engine.measure.results import Loading
from workers.engine.measure.verify import check_loading


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"missing": ("a.weight",)}, "a.weight are missing from the files and were made up"),
        ({"unexpected": ("b.weight",)}, "b.weight were dropped"),
        ({"mismatched": ("c.weight",)}, "c.weight have another shape"),
    ],
)
def test_each_way_to_lose_a_weight_is_named(fault: dict[str, Any], words: str) -> None:
    with pytest.raises(VerificationFailed, match=words):
        check_loading(runner_facts(), runner_facts(loading=Loading(**fault)))


def test_what_the_original_lacks_too_is_no_fault_of_the_export() -> None:
    pooler = Loading(missing=("pooler.dense.weight",), unexpected=("cls.predictions.bias",))
    check_loading(runner_facts(loading=pooler), runner_facts(loading=pooler))
    check_loading(runner_facts(loading=pooler), runner_facts())


def test_a_long_list_is_cut_and_counted() -> None:
    lost = Loading(missing=tuple(f"layer.{i}" for i in range(9)))
    with pytest.raises(VerificationFailed, match="and 4 more"):
        check_loading(runner_facts(), runner_facts(loading=lost))
