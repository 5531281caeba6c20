"""Under DeepSpeed too, LENA adds a few launches to an update on a GPU, whatever the number of tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.helpers.launches import Chain, Launches, paths_of_a_gpu
from tests.integrations._engines import config, engine, stock_engine
from tests.integrations._ranks import Ranks

ONLY_HERE = ("_foreach_mul",)  # on a GPU the norms themselves are kept
COLLECTIVES = ("allreduce_",)
MOST = {"adamw": 12, "lamb": 20, "lars": 20}
BATCH_OF_HOOKS = 1


def launches(made: Any) -> Counter[str]:
    """Those of the last of some updates of one micro-batch."""
    dtype = next(made.module.parameters()).dtype
    for _ in range(4):
        loss = made(torch.ones(2, 3, dtype=dtype)).square().mean()
        with Launches() as in_backward:
            made.backward(loss)
        with Launches() as in_step:
            made.step()
    return in_backward.counts + in_step.counts


def added(stage: int, precision: str, base: str, tensors: int) -> dict[str, int]:
    """What an update of LENA launches beyond one of torch's fused AdamW."""
    entries = config(stage, precision, lena={"base": base}, gradient_clipping=1.0) | {"gradient_accumulation_steps": 1}
    with stock_engine(entries, Chain(tensors)) as made:
        stock = launches(made)
    with paths_of_a_gpu(with_kernels=True), engine(entries, Chain(tensors)) as made:
        lena = launches(made)
    names = {*stock, *lena} - {*ONLY_HERE, *COLLECTIVES}
    return {name: lena[name] - stock[name] for name in sorted(names) if lena[name] != stock[name]}


@pytest.mark.parametrize("base", MOST)
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16-fp32"), (2, "bf16")])
def test_they_do_not_depend_on_the_number_of_tensors(ranks: Ranks, stage: int, precision: str, base: str) -> None:
    few, many = ([sum(found.values()) for found in ranks.run(added, stage, precision, base, n)] for n in (4, 40))
    assert few == many
    assert all(count <= MOST[base] + BATCH_OF_HOOKS for count in many), ranks.run(added, stage, precision, base, 4)
