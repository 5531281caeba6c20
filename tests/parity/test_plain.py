"""Plain PyTorch: one process, DistributedDataParallel, and a user's own clipping."""

from __future__ import annotations

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import windows
from tests.helpers.model import ModelOptions

USED = ModelOptions(spare=False)  # DDP needs find_unused_parameters elsewhere


def plain(name: str, **fields: object) -> Case:
    return Case(**({"name": f"plain-{name}", "stage": None} | fields))  # type: ignore[arg-type]


ONE_PROCESS = [
    plain("one-process", world=1, accumulation=4, schedule="decaying"),
    plain("one-process-sgd", world=1, accumulation=4, base="sgd", layer="module"),
    plain("clipped", world=1, accumulation=4, clipping=0.5),
    plain("single", world=1, accumulation=1),
    plain("resized", world=1, windows=windows(4, 4, 2, 4, 1, 4, 4, 3, 4, 4), usage="every other window"),
    plain("base", world=1, accumulation=4, lena={"base_batch_size": 4, "micro_batch_size": 2}),
    plain("checkpointing", world=1, accumulation=2, model=ModelOptions(checkpointing="reentrant")),
    plain(
        "named-parameters", world=1, accumulation=4, groups="flat", lena={"exclude": ["*.bias"], "no_decay": ["*norm*"]}
    ),
    plain("unnamed", world=1, accumulation=4, groups="unnamed"),
]

DDP = [
    plain("ddp", accumulation=1, usage="always", model=USED),
    plain("ddp-accumulated", accumulation=4, usage="always", model=USED, clipping=0.5),
    plain("ddp-no-sync", accumulation=4, loop="no_sync", usage="always", model=USED, clipping=0.5),
    plain("ddp-no-sync-sgd", accumulation=2, loop="no_sync", usage="always", model=USED, base="sgd", layer="block"),
    plain("ddp-static-graph", accumulation=1, usage="always", model=USED, config={"static_graph": True}),
    plain("ddp-ranks-disagree", accumulation=1, usage="ranks disagree"),
    plain("ddp-ranks-disagree-accumulated", accumulation=2, usage="ranks disagree", clipping=0.5),
    plain("ddp-named-parameters", accumulation=2, groups="flat"),
]


@pytest.mark.parametrize("case", ONE_PROCESS + DDP, ids=lambda case: case.name)
def test_plain_pytorch(case, run_case):
    check(case, run_case)
