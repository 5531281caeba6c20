"""The optimizer on NVMe, for one sub-group after the other: the same numbers, and no gradient of another window.

Some gradients are large enough for NVMe, some parts of gradients stay on the CPU, and so do some sub-groups.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import UPDATES, Case, Window
from tests.helpers.check import check
from tests.helpers.marks import full
from tests.helpers.model import ModelOptions
from tests.helpers.nvme import why_not_on_nvme


def nvme(name: str, sub_group_size: int = 700, **fields: Any) -> Case:
    offload = {"device": "nvme", **fields.pop("offload", {})}
    zero = {"offload_optimizer": offload, "sub_group_size": sub_group_size, "stage3_param_persistence_threshold": 0}
    return Case(f"nvme-{name}", stage=3, zero=zero, **fields)


BIAS = ModelOptions(bias=True)
PIPELINE = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
CLIENT: dict[str, Any] = {"optimizer": "client", "config": {"zero_force_ds_cpu_optimizer": False}}
# Without LENA, DeepSpeed moves what no update uses by whatever it has read.
USED: dict[str, Any] = {"usage": "always", "groups": "flat", "model": ModelOptions(spare=False)}
UNUSED = "every other window"
POISONED = tuple(Window(2, poisoned=update in (0, 4, 5)) for update in range(UPDATES))
CASES = [
    nvme("mixed", clipping=0.5),
    nvme("one-sub-group", sub_group_size=10**9),
    nvme("pipeline", offload=PIPELINE, clipping=0.5),
    nvme("unused-window", usage=UNUSED, model=BIAS, clipping=0.5),
    nvme("first-used-late", usage="later micro-batches", model=BIAS, accumulation=4),
    nvme("sgd", base="sgd", layer="block", clipping=0.5),
    nvme("bf16", precision="bf16", clipping=0.5),
    nvme("bf16-fp32-sgd", precision="bf16-fp32", base="sgd"),
    nvme("fp16-skipped", precision="fp16", windows=POISONED, clipping=0.5),
    nvme("client", schedule="decaying", **CLIENT),
    nvme("one-rank", world=1),
    nvme("watched", optimizer="watched", config=CLIENT["config"], clipping=0.5, **USED),
]


@pytest.mark.parametrize("case", full(CASES), ids=lambda case: case.name)
def test_nvme_does_not_show(case, run_case):
    if why_not_on_nvme():
        pytest.skip(why_not_on_nvme())
    check(case, run_case)
