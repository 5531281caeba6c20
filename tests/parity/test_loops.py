"""How a script drives the engine: accumulation in all its styles, schedulers, evaluation, skipped updates."""

from __future__ import annotations

import pytest

from tests.helpers.case import UPDATES, Window
from tests.helpers.check import check
from tests.helpers.make import stages, windows

ALL = (0, 1, 2, 3)
ZERO = (1, 2, 3)

SHORT = windows(3, 3, 1, 3, 3, 2, 3, 3, 1, 3)
RESIZED = windows(2, 2, 4, 4, 4, 1, 1, 2, 2, 2)  # DeepSpeed counts all micro-batches modulo the new number
LARGER = windows(2, 2, 2, 2) + windows(2, 2, 2, size=4) + windows(2, 2, 2, size=1)
IDLE = tuple(Window(3, idle=(1,) if update % 4 == 1 else ()) for update in range(UPDATES))
POISONED = tuple(Window(2, poisoned=update in (0, 4, 5)) for update in range(UPDATES))

ACCUMULATION = [
    *stages(ALL, "boundary-set-by-caller", loop="boundary", windows=SHORT, clipping=0.5),
    *stages((1,), "boundary-set-by-caller-bf16", loop="boundary", windows=SHORT, precision="bf16-fp32"),
    *stages((0, 1), "no-sync", loop="no_sync", accumulation=4, clipping=0.5),
    *stages((0, 1), "no-sync-bf16", loop="no_sync", precision="bf16"),
    *stages((1,), "no-sync-bf16-fp32", loop="no_sync", precision="bf16-fp32"),
    *stages(ALL, "caller-owns-boundary", loop="unmanaged", config={"managed_gradient_accumulation": False}),
    *stages(ZERO, "coalesced-reduction", loop="coalesce"),
    *stages(ZERO, "torch-backward", loop="torch backward"),
    *stages(ALL, "batch-size-changed", windows=RESIZED, world=4),
    *stages((0, 2), "micro-batch-size-changed", windows=LARGER, lena={"base_batch_size": 2}),
    *stages((1, 3), "micro-batch-size-changed-large-base", windows=LARGER, lena={"base_batch_size": 6}),
    *stages(ALL, "backward-not-called", windows=IDLE),
    *stages((1,), "backward-not-called-bf16-fp32", windows=IDLE, precision="bf16-fp32"),
]

AROUND = [
    *stages(ALL, "evaluation-between-updates", evaluate="between updates"),
    *stages(ALL, "evaluation-between-micro-batches", evaluate="between micro-batches"),
    *stages(ALL, "scheduler", schedule="decaying"),
    *stages(ALL, "client-optimizer", optimizer="client", schedule="decaying"),
    *stages(ALL, "second-engine", repeat=2),
]

# Not at stage 0 in fp32: there DeepSpeed applies such an update.
SKIPPED = [
    *stages(ZERO, "skipped-updates", windows=POISONED, schedule="decaying"),
    *stages((0, 1, 2, 3), "skipped-updates-bf16", windows=POISONED, precision="bf16"),
    *stages((1,), "skipped-updates-bf16-fp32", windows=POISONED, precision="bf16-fp32", clipping=0.5),
]


@pytest.mark.parametrize("case", ACCUMULATION + AROUND + SKIPPED, ids=lambda case: case.name)
def test_loop_does_not_show(case, run_case):
    check(case, run_case)
