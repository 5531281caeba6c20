"""Weights that the user changes between updates, and layers that are unfrozen in the middle of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from tests.integrations._engines import Net, config, engine, stock_engine
from tests.integrations._ranks import Ranks
from tests.integrations._truth import KEYS, differences, every_rank, numbers, weights

CHANGED, AFTER = "right.0.weight", 1  # the weight, and the update after which it is changed
UNFROZEN_AT = 2


def batch(update: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    return numbers(1, update, rank, micro, shape=(2, 4)), numbers(2, update, rank, micro, shape=(2, 4))


def windows(updates: range) -> list[Any]:
    return [every_rank(lambda rank, u=update: [batch(u, rank, micro) for micro in range(2)]) for update in updates]


def train(made: Any, updates: range, between: Callable[[nn.Module, int], None] = lambda model, update: None) -> None:
    for update in updates:
        for micro in range(2):
            made.backward(made(*batch(update, torch.distributed.get_rank(), micro)))
            made.step()
        between(made.module, update)


# -- changed weights --------------------------------------------------------------------------------------------------


def change(model: nn.Module, update: int) -> None:
    """In a plain model."""
    if update == AFTER:
        model.get_parameter(CHANGED).data.mul_(-2)


def change_gathered(model: nn.Module, update: int) -> None:
    """As DeepSpeed's documentation has it. The fp32 master weight stays as it is."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(model.get_parameter(CHANGED), modifier_rank=0):
        change(model, update)


def change_both(model: nn.Module, update: int) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    change_gathered(model, update)
    if update == AFTER:
        weight = model.get_parameter(CHANGED)
        safe_set_full_fp32_param(weight, -2 * safe_get_full_fp32_param(weight))


def changed_run(stage: int) -> list[str]:
    start = Net()
    with engine(config(stage, lena=KEYS), copy.deepcopy(start)) as made:
        train(made, range(4), change_both)
        return differences(made, start, windows(range(4)), divisor=2, between=change)


@pytest.mark.parametrize("stage", [2, 3])
def test_after_a_change_the_statistics_are_those_of_the_changed_weights(ranks: Ranks, stage: int) -> None:
    assert ranks.run(changed_run, stage) == [[], []]


def gathered_run() -> bool:
    """Whether a weight that is changed by `GatheredParameters` alone ends as with torch's AdamW."""
    with engine(config(3, lena=KEYS | {"scaling": "none", "warmup": "none"})) as made:
        train(made, range(4), change_gathered)
        ours = weights(made)
    with stock_engine(config(3), **KEYS) as made:
        train(made, range(4), change_gathered)
        theirs = weights(made)
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7) for name in theirs)


def test_a_change_that_deepspeed_undoes_is_undone_as_with_a_stock_optimizer(ranks: Ranks) -> None:
    assert ranks.run(gathered_run) == [True, True]


# -- unfrozen layers --------------------------------------------------------------------------------------------------


def unfrozen_run(stage: int) -> tuple[list[str], int]:
    """A new engine trains all layers of a model, after one that has trained some. And the updates that it counts."""
    model, start = Net(), Net()
    model.left.requires_grad_(False)
    with engine(config(stage, lena=KEYS), model) as made:
        train(made, range(UNFROZEN_AT))
        for name, weight in weights(made).items():
            start.get_parameter(name).data.copy_(weight)
    model.requires_grad_(True)
    updates = range(UNFROZEN_AT, UNFROZEN_AT + 3)
    with engine(config(stage, lena=KEYS), model) as made:
        train(made, updates)
        return differences(made, start, windows(updates), divisor=2), ds_lena.report(made)["update"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_new_engine_trains_layers_that_were_frozen_before(ranks: Ranks, stage: int) -> None:
    assert ranks.run(unfrozen_run, stage) == [([], 3), ([], 3)]
