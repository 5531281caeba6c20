"""fp16 with a static and a dynamic loss scale: no scale shows in the statistics, the weights or what is remembered."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import UPDATES, Case, Window
from tests.helpers.check import check
from tests.helpers.make import stages
from tests.helpers.marks import full

POISONED = tuple(Window(2, poisoned=update in (0, 4, 5)) for update in range(UPDATES))


def fp16(**entries: float) -> dict[str, Any]:
    """The entry "fp16" of a DeepSpeed config."""
    return {"fp16": {"enabled": True, **entries}}


# The scale is 16, and doubles after each update from the third one on: a rule that is not Adam's shows a wrong one.
GROWING = fp16(initial_scale_power=4, loss_scale_window=1)
FALLING = fp16(initial_scale_power=12, hysteresis=1, loss_scale_window=3)

CASES = [
    *stages((1, 2, 3), "fp16", full_at=(), precision="fp16", clipping=0.5),
    *stages((), "fp16-once", full_at=(1, 2, 3), precision="fp16", accumulation=1, base="sgd"),
    *stages((), "fp16-four-times", full_at=(1, 2, 3), precision="fp16", accumulation=4),
    *stages((3,), "fp16-growing-scale", full_at=(1, 2), precision="fp16", config=GROWING, base="sgd"),
    *stages((2,), "fp16-growing-scale-lamb", full_at=(1, 3), precision="fp16", config=GROWING, base="lamb",
            clipping=0.5),
    *stages((), "fp16-lars", full_at=(1, 2, 3), precision="fp16", base="lars", clipping=0.5),
    *stages((3,), "fp16-skipped", full_at=(1, 2), precision="fp16", config=FALLING, windows=POISONED),
    *stages((), "fp16-four-ranks", full_at=(1, 2, 3), precision="fp16", world=4, usage="every other window"),
    *stages((), "fp16-client", full_at=(1, 2, 3), precision="fp16", optimizer="client", layer="block"),
    *stages((), "fp16-fp32-accumulation", full_at=(1, 2, 3), precision="fp16", clipping=0.5,
            config={"data_types": {"grad_accum_dtype": "fp32"}}),
    *stages((), "fp16-coalesce", full_at=(1, 2, 3), precision="fp16", loop="coalesce"),
    *stages((), "fp16-no-sync", full_at=(1,), precision="fp16", loop="no_sync"),
    *stages((), "fp16-offload-states", full_at=(1, 2), precision="fp16", loop="offload states"),
    *stages((), "fp16-unmanaged", full_at=(2, 3), precision="fp16", loop="unmanaged",
            config={"managed_gradient_accumulation": False}),
    *full([Case("fp16-hpz", stage=3, precision="fp16", zero={"zero_hpz_partition_size": 2})]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_loss_scale_does_not_show(case, run_case):
    check(case, run_case)
