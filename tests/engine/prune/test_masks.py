"""Which weights go, counted and compared with sorting."""

from __future__ import annotations

import pytest
import torch

from workers.engine.prune.criteria import CRITERIA, LayerStatistics
from workers.engine.prune.masks import Pattern

SCORES = torch.rand(12, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "group"), [("2:4", 4), ("4:8", 8), ("1:4", 4)])
def test_of_each_group_the_lowest_go(name: str, group: int) -> None:
    gone = Pattern.named(name, 0.5).lowest(SCORES, by_row=False)
    count = int(name[0])
    for scores, lost in zip(SCORES.view(-1, group), gone.view(-1, group), strict=True):
        assert set(lost.nonzero().flatten().tolist()) == set(scores.argsort()[:count].tolist())


def test_of_each_row_an_equal_share_goes() -> None:
    gone = Pattern.named("unstructured", 0.3).lowest(SCORES, by_row=True)
    assert gone.sum(1).tolist() == [12] * 12
    assert (SCORES.masked_fill(~gone, 0).amax(1) < SCORES.masked_fill(gone, 2).amin(1)).all()


def test_of_all_the_lowest_go() -> None:
    gone = Pattern.named("unstructured", 0.3).lowest(SCORES, by_row=False)
    assert gone.sum() == 144
    assert SCORES[gone].max() < SCORES[~gone].min()


def test_what_criteria_say_of_small_numbers() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0]])
    statistics = LayerStatistics(
        torch.tensor([4.0, 1.0, 0.0]), torch.tensor([0.5, 1.0, 2.0]), torch.Generator()
    )
    assert CRITERIA["magnitude"](weight, statistics).tolist() == [[1, 3, 2]]
    assert CRITERIA["wanda"](weight, statistics).tolist() == [[2, 3, 0]]
    # The last input was never anything but zero.
    assert CRITERIA["sparsegpt"](weight, statistics).tolist() == [[4, 9, 0]]


def test_chance_draws_the_same_from_the_same_seed() -> None:
    weight = torch.ones(4, 8)
    drawn = [
        CRITERIA["random"](weight, LayerStatistics(torch.ones(8), None, torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
