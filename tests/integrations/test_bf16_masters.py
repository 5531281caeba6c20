"""bf16 throughout, without fp32 master weights: DeepSpeed's `bf16_master_weights_and_grads`."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from tests.helpers.marks import rest
from tests.integrations._engines import LENA, Net, config, engine, stock_engine, train
from tests.integrations._ranks import Ranks

ALL_BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
RULES = ("sgd", "lars", "lamb")
UPDATES = range(6)
PLAIN = {"scaling": "none", "warmup": "none"}


def weights(
    stage: int, lena: dict[str, Any] | None, bf16: dict[str, Any], clipping: float = 0.0
) -> tuple[torch.dtype, list[Tensor]]:
    """The type of the masters, and whole weights after some updates; without `lena`, by torch's fused AdamW."""
    entries = config(stage, lena=lena, bf16=bf16, gradient_clipping=clipping)
    entries["data_types"] = {"grad_accum_dtype": "bf16"}
    make = stock_engine if lena is None else engine
    with make(entries, Net(width=16)) as made:
        train(made, UPDATES)
        master = next(iter(made.basic_optimizer.state))
        return master.dtype, [safe_get_full_fp32_param(p).detach().clone() for p in made.module.parameters()]


@pytest.mark.parametrize("stage", rest((1, 2, 3), (1, 3)))
def test_adamw_is_torch_s_there_too(ranks: Ranks, stage: int) -> None:
    ours = ranks.run(weights, stage, PLAIN, ALL_BF16)
    stock = ranks.run(weights, stage, None, ALL_BF16)
    for (kind, mine), (_, theirs) in zip(ours, stock, strict=True):
        assert kind == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("stage", "base"), rest(product((1, 2, 3), RULES), zip((2, 3, 1), RULES, strict=True)))
def test_other_rules_end_where_master_weights_end_but_for_rounding(ranks: Ranks, stage: int, base: str) -> None:
    keys = {"base": base, "lr": LENA["lr"], "weight_decay": 0.1}
    narrow = ranks.run(weights, stage, keys, ALL_BF16, clipping=0.5)
    wide = ranks.run(weights, stage, keys, {"enabled": True}, clipping=0.5)
    for (narrow_kind, mine), (wide_kind, exact) in zip(narrow, wide, strict=True):
        assert (narrow_kind, wide_kind) == (torch.bfloat16, torch.float32)
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.02)
