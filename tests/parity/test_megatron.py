"""Megatron-core's own data parallelism and optimizers, without DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import Case, Window
from tests.helpers.check import check
from tests.helpers.make import Cases
from tests.helpers.marks import full

EPS = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.1}  # a bias of keys has a true gradient of zero
SHARDED = {"use_distributed_optimizer": True}
FP32_SUMS = {"grad_reduce_in_fp32": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TWO_GROUPS = {"weight_decay": 0.3, "no_decay": ["*.bias", "*norm*"], "exclude": ["embedding.position*"]}


def megatron(name: str, tensor: int = 1, model: str = "megatron", **fields: Any) -> Case:
    lena = {"eps": EPS[fields.get("precision", "fp32")]} if fields.get("base", "adamw") in ("adamw", "lamb") else {}
    lena |= fields.pop("lena", {})
    fields = {"groups": "flat", "clipping": 0.5} | fields
    return Case(f"own-loop-{name}", stage=None, tensor=tensor, split=model, lena=lena, **fields)


ONE_AND_TWO: Cases = [
    megatron("dp2", accumulation=1),
    megatron("dp2-lamb-sharded", base="lamb", config=SHARDED, accumulation=4, schedule="decaying"),
    megatron("dp2-sgd-module", base="sgd", layer="module", accumulation=4, clipping=0.0),
    megatron("dp2-bf16-sharded", precision="bf16", config=SHARDED | FP32_SUMS | OVERLAP),
    megatron("dp2-fp16-skipped", precision="fp16", windows=(Window(2), Window(2, poisoned=True), *[Window(2)] * 3)),
    megatron("dp2-per-token", loop="per token", accumulation=4, config=SHARDED),
    megatron("dp2-groups-lamb", loop="two groups", base="lamb", lena=TWO_GROUPS, config=SHARDED),
    megatron("dp2-again", loop="again"),
    megatron("dp2-gpu-paths", config=SHARDED | OVERLAP, as_on_a_gpu=True),
    megatron("tp2", tensor=2),
    megatron("tp2-sequence-lamb-sharded", tensor=2, model="megatron-sequence", base="lamb", config=SHARDED),
    megatron("tp2-sequence-bf16", tensor=2, model="megatron-sequence", precision="bf16", accumulation=4),
    megatron("tp2-head-norms", tensor=2, model="megatron-head-norms"),
    megatron("pp2-tied-lamb", pipe=2, loop="schedule", model="megatron-tied", base="lamb", accumulation=4),
    *full(
        [
            megatron("one-rank-sharded", world=1, accumulation=4, config=SHARDED),
            megatron("dp2-lars", base="lars"),
            megatron("dp2-fp16-lamb", base="lamb", precision="fp16"),
            megatron("dp2-block-sharded", layer="block", config=SHARDED),
            megatron("dp2-tied", model="megatron-tied", config=SHARDED | OVERLAP),
            megatron("dp2-bf16", precision="bf16"),
            megatron("dp2-fp16-sharded", precision="fp16", config=SHARDED),
            megatron("dp2-schedule", loop="schedule", accumulation=4),
            megatron("dp2-groups", loop="two groups", lena=TWO_GROUPS),
            megatron("dp2-recompute", loop="recompute"),
            megatron("tp2-model", tensor=2, layer="model", accumulation=1, clipping=0.0),
            megatron("tp2-sequence", tensor=2, model="megatron-sequence", accumulation=4, schedule="decaying"),
            megatron("pp2", pipe=2, loop="schedule"),
            megatron("pp2-bf16-sharded", pipe=2, loop="schedule", precision="bf16", layer="block", config=SHARDED),
        ]
    ),
]
FOUR: Cases = [
    megatron("tp2-dp2-sequence-sharded", world=4, tensor=2, model="megatron-sequence", config=SHARDED),
    megatron("tp2-pp2-sequence", world=4, tensor=2, pipe=2, loop="schedule", model="megatron-sequence"),
    *full(
        [
            megatron("tp2-dp2-lamb", world=4, tensor=2, base="lamb", accumulation=4),
            megatron("pp2-dp2-tied-sharded", world=4, pipe=2, loop="schedule", model="megatron-tied", config=SHARDED),
        ]
    ),
]


def watched(name: str, **fields: Any) -> Case:
    return megatron(f"watched-{name}", optimizer="watched", **fields)


WATCHED: Cases = [
    watched("dp2-bf16-sharded", precision="bf16", config=SHARDED | FP32_SUMS | OVERLAP),
    watched("dp2-fp16-skipped", precision="fp16", windows=(Window(2), Window(2, poisoned=True), *[Window(2)] * 3)),
    watched("dp2-sgd-per-token", loop="per token", base="sgd", accumulation=4, layer="module"),
    watched("tp2-sequence-sharded", tensor=2, model="megatron-sequence", config=SHARDED),
    watched("pp2-tied", pipe=2, loop="schedule", model="megatron-tied", accumulation=4),
    watched("tp2-pp2-sequence", world=4, tensor=2, pipe=2, loop="schedule", model="megatron-sequence"),
    *full(
        [
            watched("one-rank-sharded", world=1, accumulation=4, config=SHARDED),
            watched("dp2-smoothed", lena={"smoothing": 0.5}, layer="block", schedule="decaying"),
            watched("dp2-groups", loop="two groups", lena=TWO_GROUPS, config=SHARDED),
            watched("dp2-again-sgd", loop="again", base="sgd"),
            watched("dp2-fp16-sharded", precision="fp16", config=SHARDED),
            watched("dp2-recompute-bf16", loop="recompute", precision="bf16"),
            watched("tp2-head-norms", tensor=2, model="megatron-head-norms"),
            watched("tp2-sequence-bf16", tensor=2, model="megatron-sequence", precision="bf16", accumulation=4),
            watched("pp2-bf16-sharded", pipe=2, loop="schedule", precision="bf16", config=SHARDED),
            watched("tp2-dp2-sequence", world=4, tensor=2, model="megatron-sequence", config=SHARDED),
            watched("pp2-dp2-tied", world=4, pipe=2, loop="schedule", model="megatron-tied", config=SHARDED),
        ]
    ),
]


@pytest.mark.parametrize("case", ONE_AND_TWO + FOUR + WATCHED, ids=lambda case: case.name)
def test_megatrons_own_loop(case: Case, run_case: Any) -> None:
    check(case, run_case)
