"""Calls in an order that has no right result, and engines that stand in each other's way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_lena
from ds_lena.optimizer import controller_of
from tests.integrations._engines import LENA, Net, batch, config, engine, moved, refusal, train, without_optimizer
from tests.integrations._ranks import Ranks

BEFORE, AFTER = range(2), range(2, 5)


def step_of_the_wrapper(stage: int, precision: str) -> tuple[str, bool, dict[str, Any], dict[str, Any]]:
    """The error of `engine.optimizer.step()`, whether the weights stayed, and the reports before and after it."""
    with engine(config(stage, precision)) as made:
        train(made, BEFORE)
        made.set_gradient_accumulation_boundary(True)
        made.backward(made(*batch(2, 0)))
        weights, before, message = moved(made), ds_lena.report(made), ""
        try:
            made.optimizer.step()
        except ds_lena.StateError as error:
            message = str(error)
        torch.distributed.barrier()
        stayed = all(torch.equal(a, b) for a, b in zip(weights, moved(made), strict=True))
        return message, stayed, before, ds_lena.report(made)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16-fp32"), (2, "fp32"), (3, "fp32")]
)
def test_the_optimizers_own_step_is_an_error_under_deepspeed(ranks: Ranks, stage: int, precision: str) -> None:
    for message, stayed, before, after in ranks.run(step_of_the_wrapper, stage, precision):
        assert "optimizer.step() was called directly" in message and "engine.step()" in message
        assert stayed and after == before


def half_shared(model: Net) -> Net:
    """A model of its own but for the left tower."""
    other = Net(seed=1)
    other.left = model.left
    return other


def second_engine(stage: int) -> tuple[str, bool]:
    """The refusal of a second engine on the left tower, and whether the first one trained on undisturbed."""
    with engine(config(stage)) as undisturbed:
        train(undisturbed, [*BEFORE, *AFTER])
        wanted = moved(undisturbed)
    model = Net()
    with engine(config(stage), model) as first:
        train(first, BEFORE)
        message = refusal(config(stage), half_shared(model))
        train(first, AFTER)
        return message, all(torch.equal(a, b) for a, b in zip(wanted, moved(first), strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_engines_cannot_share_a_parameter(ranks: Ranks, stage: int) -> None:
    for message, trains_on in ranks.run(second_engine, stage):
        assert '"left.0.weight" is already trained by another DeepSpeed engine' in message
        assert "call destroy() on the first engine" in message and "trainer.model_wrapped.destroy()" in message
        assert trains_on


def destroyed_but_kept(stage: int) -> tuple[str, int, int]:
    """The refusal of a second engine after the first was destroyed, the updates of a third then, and the passes that
    the first one saw of them.
    """
    import deepspeed

    model = Net()
    first = deepspeed.initialize(model=model, config=config(stage))[0]
    hooks = controller_of(first.basic_optimizer).hooks
    train(first, BEFORE)
    first.destroy()
    message = refusal(config(stage), half_shared(model))
    with engine(config(stage), model) as third:
        train(third, BEFORE)
        updates = ds_lena.report(third)["update"]
    del first
    return message, updates, hooks.passes


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_destroyed_engine_lets_go_of_its_parameters(ranks: Ranks, stage: int) -> None:
    assert ranks.run(destroyed_but_kept, stage) == [("", 2, 0)] * 2


def used_after_destroy(stage: int) -> tuple[str, str]:
    """The errors of a client LENA given to a second engine, and of a destroyed engine's step."""
    import deepspeed

    model = Net()
    client = ds_lena.LENA(model.named_parameters(), **LENA)
    entries = without_optimizer(config(stage, gradient_accumulation_steps=1))
    first = deepspeed.initialize(model=model, optimizer=client, config=entries)[0]
    first.backward(first(*batch(0, 0)))
    first.step()
    first.destroy()
    second = refusal(entries, model, optimizer=client)
    try:
        first.step()
        return second, ""
    except ds_lena.StateError as error:
        return second, str(error)


@pytest.mark.parametrize("stage", [0, 1])
def test_an_optimizer_of_a_destroyed_engine_says_that_it_sees_nothing(ranks: Ranks, stage: int) -> None:
    for messages in ranks.run(used_after_destroy, stage):
        assert all("belongs to a DeepSpeed engine that was" in message for message in messages)


def two_models() -> list[int]:
    with engine(config(2)) as one, engine(config(1), Net(seed=1)) as other:
        train(one, range(3))
        train(other, range(2))
        return [ds_lena.report(one)["update"], ds_lena.report(other)["update"]]


def test_two_engines_with_models_of_their_own_do_not_meet(ranks: Ranks) -> None:
    assert ranks.run(two_models) == [[3, 2]] * 2
