from __future__ import annotations

from typing import Literal

import pytest

from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.text import read_documents


@pytest.mark.parametrize("name", ["evaluation", "calibration"])
def test_built_in_text_is_prose_in_documents(name: Literal["evaluation", "calibration"]) -> None:
    documents = read_documents(builtin_text(name))
    assert len(documents) > 300 or name == "calibration"
    assert sum(map(len, documents)) > 75_000
    assert all("\n" not in document for document in documents)


def test_built_in_texts_share_no_document() -> None:
    evaluation, calibration = (set(read_documents(builtin_text(n))) for n in ("evaluation", "calibration"))
    assert not evaluation & calibration
