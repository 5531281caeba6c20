"""A user's own tensor hook changes what is measured in the same way, whenever it is placed."""

from __future__ import annotations

from typing import Any

import pytest

import ds_lena
from tests.integrations._engines import Net, config, engine, train
from tests.integrations._ranks import Ranks


def report_with_a_hook(stage: int, before: bool) -> dict[str, Any]:
    model = Net()

    def place() -> None:
        for parameter in model.left.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))

    if before:
        place()
    with engine(config(stage), model) as made:
        if not before:
            place()
        train(made, range(2))
        return ds_lena.report(made)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_hook_placed_after_initialize_counts_as_one_placed_before(ranks: Ranks, stage: int) -> None:
    assert ranks.run(report_with_a_hook, stage, False) == ranks.run(report_with_a_hook, stage, True)
