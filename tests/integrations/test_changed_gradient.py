"""A user changes the averaged gradient between backward and step: it moves the weights, and is in no statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_lena
from tests.helpers.launches import paths_of_a_gpu
from tests.integrations._engines import Net, batch, config, engine, train
from tests.integrations._ranks import Ranks

HALF = 0.5
LAYOUTS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp32"), (3, "fp32")]
LAYOUTS += [(2, "fp32 + offload"), (3, "fp32 + offload"), (2, "fp16")]
SGD = {"base": "sgd", "momentum": 0.0, "lr": 0.5}
LAMB = {"base": "lamb", "eps": 1e-6}


def halve(made: Any, stage: int) -> None:
    """All gradients, as DeepSpeed has users do it."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    for parameter in made.module.parameters():
        if getattr(parameter, "ds_numel", 0) % 2:
            continue  # DeepSpeed's ZeRO-3 cannot set it on two ranks
        if stage == 0:
            parameter.grad.mul_(HALF)
        else:
            safe_set_full_grad(parameter, safe_get_full_grad(parameter) * HALF)


def after_one_update(
    stage: int, precision: str, lena: dict[str, Any], clipping: float, is_halved: bool
) -> tuple[dict[str, Any], list[Tensor]]:
    """The report, and the way that each weight has gone."""
    import deepspeed

    torch.manual_seed(0)
    model = Net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with engine(config(stage, precision, lena=lena, gradient_clipping=clipping), model) as made:
        if is_halved:
            step = made.step
            made.step = lambda: (made.is_gradient_accumulation_boundary() and halve(made, stage), step())
        train(made, range(1))
        with deepspeed.zero.GatheredParameters(list(made.module.parameters())):
            gone = [p.detach().float() - b for p, b in zip(made.module.parameters(), before, strict=True)]
        return ds_lena.report(made), gone


def reduced_by_hand(stage: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reports of a loop that reduces by itself, and of one that leaves it to backward."""
    reports = []
    for by_hand in (True, False):
        with engine(config(stage, gradient_accumulation_steps=1), Net()) as made:
            made.enable_backward_allreduce = not by_hand
            for update in range(2):
                made.backward(made(*batch(update, 0)))
                if by_hand:
                    made.allreduce_gradients()
                made.step()
            reports.append(ds_lena.report(made))
    return reports[0], reports[1]


@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_reduced_after_backward_is_the_reduced_one(ranks: Ranks, stage: int) -> None:
    for by_hand, usual in ranks.run(reduced_by_hand, stage):
        assert by_hand == usual


def without_a_tower(how: str) -> dict[str, Any]:
    """The report of an update whose left tower has lost its gradient, thrown away before the step or never made."""
    with engine(config(0, lena=SGD | {"layer": "model"}), Net()) as made:
        made.module.left.requires_grad_(how == "thrown away")
        for micro in range(2):
            made.backward(made(*batch(0, micro)))
            if micro == 1:
                for parameter in made.module.left.parameters():
                    parameter.grad = None
            made.step()
        return ds_lena.report(made)


def test_a_gradient_that_is_thrown_away_after_backward_is_in_no_statistics(ranks: Ranks) -> None:
    thrown_away, never = ranks.run(without_a_tower, "thrown away")[0], ranks.run(without_a_tower, "never made")[0]
    assert thrown_away == never


def with_graph(stage: int) -> tuple[dict[str, Any], dict[str, Any]]:
    reports = []
    for keeps_graph in (True, False):
        with engine(config(stage), Net()) as made:
            for micro in range(2):
                (made(*batch(0, micro)) / 2).backward(create_graph=keeps_graph)
                made.step()
            reports.append(ds_lena.report(made))
    return reports[0], reports[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_backward_that_keeps_its_graph_is_measured_alike(ranks: Ranks, stage: int) -> None:
    for kept, usual in ranks.run(with_graph, stage):
        assert kept == usual


def both(*given: Any) -> list[tuple[dict[str, Any], list[Tensor]]]:
    return [after_one_update(*given, is_halved) for is_halved in (False, True)]


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_it_moves_the_weights_and_is_not_in_the_statistics(ranks: Ranks, stage: int, precision: str) -> None:
    bounds = {"rtol": 1e-3, "atol": 1e-6} if precision.startswith("fp32") else {"rtol": 0.1, "atol": 2e-2}
    for (report, gone), (changed, half) in ranks.run(both, stage, precision, SGD, 0.0):
        assert changed == report
        assert max(float(part.abs().max()) for part in gone) > 0.05
        for now, part in zip(half, gone, strict=True):
            torch.testing.assert_close(now, part if stage == 3 and part.numel() % 2 else HALF * part, **bounds)


def both_as_on_a_gpu(*given: Any) -> list[tuple[dict[str, Any], list[Tensor]]]:
    with paths_of_a_gpu():
        return both(*given)


@pytest.mark.parametrize("run", [both, both_as_on_a_gpu])
@pytest.mark.parametrize("stage", [0, 1])
def test_trust_ratios_are_those_of_the_gradient_that_is_clipped(
    ranks: Ranks, stage: int, run: Callable[..., Any]
) -> None:
    """Both are clipped to the same gradient."""
    for (report, gone), (changed, same) in ranks.run(run, stage, "fp32", LAMB, 0.01):
        assert changed == report
        assert any(bool(part.any()) for part in gone)
        torch.testing.assert_close(same, gone, rtol=1e-3, atol=1e-6)
