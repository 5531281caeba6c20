"""Layers of `deepspeed.moe`: experts on one rank, or spread over several that send each other tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import Case, Window
from tests.helpers.check import check
from tests.helpers.make import Cases, stages, windows


def spread(which: tuple[int, ...], name: str = "", full_at: tuple[int, ...] = (), **fields: Any) -> Cases:
    fields = {"groups": "flat", "expert": 2, "split": "moe"} | fields
    return stages(which, f"moe{name}", full_at, **fields)


BF16 = {"exclude": ["*.coefficient.bias"]}  # of two elements, whose gradients cancel
FP16 = BF16 | {"eps": 1e-3}  # experts that few tokens reach have small gradients
SKIPPED = (Window(2), Window(2, poisoned=True), *windows(2, 2, 2))

TWO_RANKS = [
    *spread((0, 1, 2)),
    *spread((), "-one-rank", expert=1, full_at=(0, 1, 2)),
    *spread((), "-lamb", base="lamb", clipping=0.5, full_at=(1, 2)),
    *spread((0,), "-lamb", base="lamb"),
    *spread((), "-lars", base="lars", clipping=0.5, full_at=(1, 2)),
    *spread((0,), "-one-rank-lars", base="lars", clipping=0.5, expert=1),
    *spread((2,), "-sgd-module", base="sgd", layer="module", accumulation=4, clipping=0.5, full_at=(1,)),
    *spread((), "-block", layer="block", full_at=(0, 1, 2)),
    *spread((2,), "-mixed", split="moe-mixed", base="lamb", clipping=0.5, full_at=(1,)),
    *spread((), "-mixed-model", split="moe-mixed", layer="model", full_at=(0, 1, 2)),
    *spread((), "-groups", groups="named", full_at=(1,)),
    *spread((), "-model", layer="model", full_at=(0, 1, 2)),
    *spread((), "-once", accumulation=1, full_at=(0, 1, 2)),
    *spread((2,), "-client", optimizer="client", groups="named", schedule="decaying", full_at=(0, 1)),
    *spread((0,), "-bf16", precision="bf16", lena=BF16, full_at=(1, 2)),
    *spread((1,), "-bf16-fp32", precision="bf16-fp32", lena=BF16, clipping=0.5, full_at=(2,)),
    *spread((), "-fp16", precision="fp16", lena=FP16, full_at=(1, 2)),
    *spread((2,), "-offload", zero={"offload_optimizer": {"device": "cpu"}}, clipping=0.5, full_at=(1,)),
    *spread((), "-options", zero={"overlap_comm": True, "round_robin_gradients": True}, full_at=(2,)),
    *spread((), "-coalesced", loop="coalesce", full_at=(1, 2)),
    *spread((1,), "-skipped", precision="fp16", lena=FP16, windows=SKIPPED, full_at=(2,)),
]
OF_TRANSFORMERS = [
    *spread((3,), "-mixtral", split="moe-mixtral", expert=1, clipping=0.5, full_at=(0, 1, 2)),
    *spread((3,), "-qwen3", split="moe-qwen3", expert=1, base="lamb", full_at=(0, 1, 2)),
    *spread((), "-qwen2", split="moe-qwen2", expert=1, full_at=(0, 1, 2, 3)),
]
FOUR_RANKS = [
    *spread((2,), "-4", world=4, clipping=0.5, base="lamb", full_at=(1,)),
    *spread((0,), "-4", world=4, base="lamb"),
    *spread((), "-4-ep4", world=4, expert=4, full_at=(0, 1, 2)),
    *spread((2,), "-4-strided", world=4, config={"use_data_before_expert_parallelism": True}, full_at=(0, 1)),
]


@pytest.mark.parametrize("case", TWO_RANKS + OF_TRANSFORMERS + FOUR_RANKS, ids=lambda case: case.name)
def test_experts_are_measured_as_dense_layers_are(case: Case, run_case: Any) -> None:
    check(case, run_case)
