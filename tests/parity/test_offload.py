"""The optimizer, or the parameters, on the CPU: the same numbers, and no gradient of another window."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import UPDATES, Case, Window
from tests.helpers.check import check
from tests.helpers.make import Cases, stages, windows
from tests.helpers.marks import full
from tests.helpers.model import ModelOptions

OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
PARAM = {"offload_param": {"device": "cpu"}}
BOTH = OPTIMIZER | PARAM
SUB_GROUPS = {"sub_group_size": 100, "stage3_param_persistence_threshold": 0}
ANY_OPTIMIZER = {"zero_force_ds_cpu_optimizer": False}
SHORT = windows(3, 3, 1, 3, 3, 2, 3, 3, 1, 3)
IDLE = tuple(Window(3, idle=(1,) if update % 4 == 1 else ()) for update in range(UPDATES))
POISONED = tuple(Window(2, poisoned=update in (0, 4, 5)) for update in range(UPDATES))
UNUSED = "every other window"
BIAS = ModelOptions(bias=True)
ALL = (1, 2, 3)


def offload(which: tuple[int, ...], name: str, **fields: Any) -> Cases:
    """The cases at the stages `which` in the default run, and under `full` at the others."""
    zero = OPTIMIZER | fields.pop("zero", {})
    return stages(which, f"offload-{name}", [stage for stage in ALL if stage not in which], zero=zero, **fields)


CASES = [
    *offload(ALL, "mixed", clipping=0.5),
    *offload((), "once", accumulation=1),
    *offload((), "four-times", accumulation=4, clipping=0.5),
    *offload((2, 3), "unused-window", usage=UNUSED, model=BIAS, clipping=0.5),
    *offload((2, 3), "first-used-late", usage="later micro-batches", model=BIAS, accumulation=4),
    *offload((2,), "sgd", base="sgd", layer="block"),
    *offload((3,), "lamb", base="lamb", clipping=0.5),
    *offload((1,), "lars", base="lars", clipping=0.5),
    *offload((2,), "bf16", precision="bf16", clipping=0.5),
    *offload((1,), "bf16-fp32", precision="bf16-fp32"),
    *offload((), "bf16-fp32-unused", precision="bf16-fp32", usage=UNUSED),
    *offload((), "bf16-fp32-late", precision="bf16-fp32", usage="later micro-batches"),
    *offload((1,), "fp16", precision="fp16", clipping=0.5, usage=UNUSED),
    *offload((3,), "client", optimizer="client", config=ANY_OPTIMIZER, schedule="decaying"),
    *offload((), "four-ranks", world=4, clipping=0.5, usage=UNUSED),
    *offload((), "one-rank", world=1, accumulation=4),
    *offload((), "skipped-fp16", precision="fp16", windows=POISONED),
    *offload((), "overlap-comm", zero={"overlap_comm": True}, usage="always"),
    *offload((), "coalesce", loop="coalesce"),
    *offload((), "unmanaged", loop="unmanaged", config={"managed_gradient_accumulation": False}),
    *offload((), "torch-backward", loop="torch backward"),
    *offload((), "boundary", loop="boundary", windows=SHORT, clipping=0.5),
    *offload((), "idle", windows=IDLE),
    *offload((), "shared", model=ModelOptions(shared=True), precision="bf16"),
    *stages((), "offload-no-sync", full_at=(1,), zero=OPTIMIZER, loop="no_sync", accumulation=4),
    *stages((), "offload-round-robin", full_at=(1, 2), zero=OPTIMIZER | {"round_robin_gradients": True}, world=4),
    Case("offload-both", stage=3, zero=BOTH, clipping=0.5, usage=UNUSED),
    Case("offload-param", stage=3, zero=PARAM, clipping=0.5),
    *full(
        [
            Case("offload-sub-groups", stage=3, zero=BOTH | SUB_GROUPS, world=4, usage=UNUSED),
            Case("offload-param-bf16", stage=3, zero=PARAM, precision="bf16"),
            Case("offload-both-fp16", stage=3, zero=BOTH, precision="fp16", clipping=0.5),
            Case("offload-both-zero-init", stage=3, zero=BOTH, zero_init=True),
        ]
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_offload_does_not_show(case, run_case):
    check(case, run_case)
