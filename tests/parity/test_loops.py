"""How a script drives the engine: accumulation in all its styles, schedulers, evaluation, skipped updates."""

from __future__ import annotations

import pytest

from tests.helpers.case import UPDATES, Window
from tests.helpers.check import check
from tests.helpers.make import stages, windows

SHORT = windows(3, 3, 1, 3, 3, 2, 3, 3, 1, 3)
RESIZED = windows(2, 2, 4, 4, 4, 1, 1, 2, 2, 2)  # DeepSpeed counts all micro-batches modulo the new number
LARGER = windows(2, 2, 2, 2) + windows(2, 2, 2, size=4) + windows(2, 2, 2, size=1)
IDLE = tuple(Window(3, idle=(1,) if update % 4 == 1 else ()) for update in range(UPDATES))
POISONED = tuple(Window(2, poisoned=update in (0, 4, 5)) for update in range(UPDATES))

ACCUMULATION = [
    *stages((0, 2, 3), "boundary-set-by-caller", full_at=(1,), loop="boundary", windows=SHORT, clipping=0.5),
    *stages((1,), "boundary-set-by-caller-bf16", loop="boundary", windows=SHORT, precision="bf16-fp32"),
    *stages((0, 1), "no-sync", loop="no_sync", accumulation=4, clipping=0.5),
    *stages((0,), "no-sync-bf16", full_at=(1,), loop="no_sync", precision="bf16"),
    *stages((1,), "no-sync-bf16-fp32", loop="no_sync", precision="bf16-fp32"),
    *stages((0, 3), "caller-owns-boundary", full_at=(1, 2), loop="unmanaged",
            config={"managed_gradient_accumulation": False}),
    *stages((2, 3), "coalesced-reduction", full_at=(1,), loop="coalesce"),
    *stages((1, 3), "torch-backward", full_at=(2,), loop="torch backward"),
    *stages((2,), "batch-size-changed", full_at=(0, 1, 3), windows=RESIZED, world=4),
    *stages((2,), "micro-batch-size-changed", full_at=(0,), windows=LARGER, lena={"base_batch_size": 2}),
    *stages((3,), "micro-batch-size-changed-large-base", full_at=(1,), windows=LARGER, lena={"base_batch_size": 6}),
    *stages((0, 3), "backward-not-called", full_at=(1, 2), windows=IDLE),
    *stages((1,), "backward-not-called-bf16-fp32", windows=IDLE, precision="bf16-fp32"),
]  # fmt: skip

AROUND = [
    *stages((3,), "evaluation-between-updates", full_at=(0, 1, 2), evaluate="between updates"),
    *stages((0, 3), "evaluation-between-micro-batches", full_at=(1, 2), evaluate="between micro-batches"),
    *stages((1,), "scheduler", full_at=(0, 2, 3), schedule="decaying"),
    *stages((0, 3), "client-optimizer", full_at=(1, 2), optimizer="client", schedule="decaying"),
    *stages((2,), "states-offloaded-between-updates", full_at=(1,), loop="offload states"),
    *stages((3,), "second-engine", full_at=(0, 1, 2), repeat=2),
]

# Not at stage 0 in fp32: there DeepSpeed applies such an update.
SKIPPED = [
    *stages((1, 3), "skipped-updates", full_at=(2,), windows=POISONED, schedule="decaying"),
    *stages((0, 2), "skipped-updates-bf16", full_at=(1, 3), windows=POISONED, precision="bf16"),
    *stages((1,), "skipped-updates-bf16-fp32", windows=POISONED, precision="bf16-fp32", clipping=0.5),
]


@pytest.mark.parametrize("case", ACCUMULATION + AROUND + SKIPPED, ids=lambda case: case.name)
def test_loop_does_not_show(case, run_case):
    check(case, run_case)
