"""Optimizers of others, watched: noise and signal are those of float64 in every layout, and so are the weights.

At ZeRO 3 and with offload DeepSpeed moves a parameter that is not always used by stale gradients. A watch mends none.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import Cases, stages

EPS = {"eps": 1e-4}  # a bias of keys has a true gradient of zero, and Adam would walk it at random
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def watched(which: tuple[int, ...], name: str, full_at: tuple[int, ...] = (), **fields: Any) -> Cases:
    fields = {"optimizer": "watched", "usage": "always", "groups": "flat"} | fields
    return stages(which, f"watched-{name}", full_at, **fields)


def split(which: tuple[int, ...], model: str, full_at: tuple[int, ...] = (), **fields: Any) -> Cases:
    return watched(which, model, full_at, split=model, **fields)


TWO_RANKS = [
    *watched((2,), "adamw", full_at=(0, 1, 3), clipping=0.5),
    *watched((1,), "sometimes", full_at=(0, 2), usage="mixed"),
    *watched((1, 3), "bf16", full_at=(2,), precision="bf16"),
    *watched((1,), "bf16-fp32", full_at=(2, 3), precision="bf16-fp32"),
    *watched((2,), "fp16", full_at=(1, 3), precision="fp16", lena=EPS),
    *watched((3,), "module", full_at=(1, 2), layer="module", base="sgd"),
    *watched((3,), "offload", full_at=(1, 2), zero=OFFLOAD, config={"zero_force_ds_cpu_optimizer": False}),
    *split((1,), "pipeline-tied", full_at=(0,), pipe=2, accumulation=4),
    *split((3,), "megatron", full_at=(0, 1, 2), tensor=2, lena=EPS),
    *split((1,), "autotp-llama", full_at=(0, 2, 3), tensor=2, lena=EPS),
    *split((2,), "moe", full_at=(0, 1), expert=2),
    *split((2,), "ulysses-gpt", full_at=(0, 1, 3), sequence=2, lena=EPS),
]
PLAIN = [
    Case("watched-one-process", world=1, stage=None, accumulation=4, optimizer="watched", groups="flat", clipping=0.5),
    Case("watched-ddp", stage=None, optimizer="watched", groups="flat", clipping=0.5),
    Case("watched-ddp-no-sync", stage=None, optimizer="watched", groups="flat", loop="no_sync"),
]


@pytest.mark.parametrize("case", TWO_RANKS + PLAIN, ids=lambda case: case.name)
def test_noise_and_signal_of_any_optimizer(case: Case, run_case: Any) -> None:
    check(case, run_case)
