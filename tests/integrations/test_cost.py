"""What LENA adds to an update: one collective, whatever the model, and no memory that grows with it."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch

import ds_lena
from benchmarks.footprint import Collectives, live_bytes
from tests.helpers.marks import rest
from tests.integrations._engines import LENA, Net, config, engine, stock_engine, train, without_optimizer
from tests.integrations._memory import allocations
from tests.integrations._ranks import Ranks

UPDATES = range(3, 6)  # counted after the first ones, in which DeepSpeed still gets to know the model
WIDTH, WIDE = 256, 1024
LARGE = 3 << 19  # bytes: less than a weight in bf16, more than what norms widen at a time


def collectives(
    stage: int, precision: str, depth: int, groups: int, micros: int, lena: bool, base: str = "adamw", **zero: Any
) -> Counter[str]:
    """All collectives of three updates, forward and backward included, by name."""
    model = Net(depth=depth)
    parameters = list(model.parameters())
    given = [{"params": parameters[start::groups]} for start in range(groups)]
    entries = without_optimizer(config(stage, precision, gradient_accumulation_steps=micros, zero=zero))
    optimizer = ds_lena.LENA(given, base=base, **LENA) if lena else torch.optim.AdamW(given, lr=LENA["lr"])
    with engine(entries, model, optimizer=optimizer) as made:
        train(made, range(UPDATES.start), [micros])
        with Collectives() as calls:
            train(made, UPDATES, [micros])
        return Counter(calls.names)


def what_lena_adds(ranks: Ranks, *case: Any, **more: Any) -> list[Counter[str]]:
    """The collectives of an update by LENA that torch's AdamW does not make, by rank."""
    added = []
    both = (ranks.run(collectives, *case, lena, **more) for lena in (True, False))
    for ours, stock in zip(*both, strict=True):
        assert stock.total() > 0, "the counter sees DeepSpeed's own"
        assert not stock - ours, "LENA replaces none of them"
        added.append(ours - stock)
    return added


LAYOUTS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16-fp32"), (2, "fp32"), (3, "fp32")]
WRAPPERS = [layout for layout in LAYOUTS if layout != (1, "fp32")]  # has the class of (2, "fp32")
SIZES = {"small": (1, 1, 1), "deep": (6, 1, 1), "many groups": (1, 4, 1), "long accumulation": (1, 1, 4)}
TRUST = ("lars", "lamb")
LARGER = list(SIZES)[1:]


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_an_update_has_one_more_all_reduce_than_adamws(ranks: Ranks, stage: int, precision: str) -> None:
    for added in what_lena_adds(ranks, stage, precision, *SIZES["small"]):
        assert added == {"allreduce_": len(UPDATES)}


@pytest.mark.parametrize(("stage", "size"), rest(product(range(4), LARGER), zip((3, 2, 0), LARGER, strict=True)))
def test_it_stays_one_for_more_layers_groups_and_micro_batches(ranks: Ranks, stage: int, size: str) -> None:
    for added in what_lena_adds(ranks, stage, "fp32", *SIZES[size]):
        assert added == {"allreduce_": len(UPDATES)}


@pytest.mark.parametrize(("stage", "base"), rest(product(range(4), TRUST), [(0, "lars"), (2, "lamb")]))
def test_trust_ratios_are_one_more_for_all_groups_together(ranks: Ranks, stage: int, base: str) -> None:
    for added in what_lena_adds(ranks, stage, "fp32", *SIZES["many groups"], base=base):
        assert added == {"allreduce_": 2 * len(UPDATES)}


def test_trust_ratios_are_one_more_for_all_sub_groups_together(ranks: Ranks) -> None:
    for added in what_lena_adds(ranks, 3, "fp32", *SIZES["deep"], base="lamb", sub_group_size=50):
        assert added == {"allreduce_": 2 * len(UPDATES)}


def network_of_report() -> list[str]:
    with engine(config(2)) as made:
        train(made, range(2))
        with Collectives() as calls:
            ds_lena.report(made)
            made.basic_optimizer.state_dict()
        return calls.names


def test_a_report_and_a_state_dict_have_none(ranks: Ranks) -> None:
    assert ranks.run(network_of_report) == [[], []]


def network_of_attaching() -> tuple[int, int]:
    with Collectives() as calls, engine(config(2)):
        pass
    with Collectives() as stock, stock_engine(config(2)):
        pass
    return len(calls.names), len(stock.names)


def test_making_an_engine_has_four_small_exchanges_of_its_own(ranks: Ranks) -> None:
    """Keys, a digest of the parameters, and errors. Each is an all_gather of a length, and one of bytes."""
    for ours, stock in ranks.run(network_of_attaching):
        assert ours == stock + 2 * 4


# -- memory ------------------------------------------------------------------------------------------------------------


def large_allocations(stage: int, precision: str, stock: bool) -> list[int]:
    """Bytes of the allocations of two whole updates that are of the order of the largest weight."""
    model = Net(width=WIDE)
    entries = config(stage, precision)
    with stock_engine(entries, model) if stock else engine(entries, model) as made:
        train(made, range(2))
        return allocations(lambda: train(made, range(2, 4)), at_least=LARGE)


def live(stage: int, precision: str, stock: bool) -> int:
    """Bytes of all tensors that are alive after some updates, less those that were before."""
    before = live_bytes()
    model = Net(width=WIDTH)
    entries = config(stage, precision)
    with stock_engine(entries, model) if stock else engine(entries, model) as made:
        train(made, range(3))
        return live_bytes() - before


@pytest.mark.parametrize(("stage", "precision"), rest(LAYOUTS, WRAPPERS))
def test_an_update_allocates_nothing_large_that_fused_adamw_does_not(ranks: Ranks, stage: int, precision: str) -> None:
    ours = ranks.run(large_allocations, stage, precision, stock=False)
    stock = ranks.run(large_allocations, stage, precision, stock=True)
    assert all(stock), "the counter sees gradients at least"
    for mine, theirs in zip(ours, stock, strict=True):
        assert Counter(mine) - Counter(theirs) == {}


@pytest.mark.parametrize(("stage", "precision"), rest(LAYOUTS, WRAPPERS))
def test_what_stays_is_adamws_moments_and_a_few_numbers_a_layer(ranks: Ranks, stage: int, precision: str) -> None:
    layers = len(list(Net().parameters()))
    ours = ranks.run(live, stage, precision, stock=False)
    stock = ranks.run(live, stage, precision, stock=True)
    for a, b in zip(ours, stock, strict=True):
        assert b > 2 * WIDTH * WIDTH * 4, "the moments are among what was counted"
        assert a - b <= 1000 * layers
