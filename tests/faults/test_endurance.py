"""A run of 20,000 updates holds no more at its end: `pytest tests/faults/test_endurance.py -m full -s`."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import ds_lena
from tests.integrations._engines import config, engine, train
from tests.integrations._ranks import Ranks

UPDATES, EVERY = 20_000, 2_000
PATIENCE = 3600.0  # seconds; alone on two cores it takes some minutes
DATA = 100  # updates with data of their own
GROWN = 2**20  # bytes that Python's and torch's allocators may still take after the first fifth


def held(made: Any) -> dict[str, int]:
    """What a process holds, counted after a collection."""
    gc.collect()
    process, module = psutil.Process(), made.module
    hooks = [vars(m)[key] for m in module.modules() for key in vars(m) if key.endswith("_hooks")]
    hooks += [
        getattr(p, key) or {} for p in module.parameters() for key in ("_backward_hooks", "_post_accumulate_grad_hooks")
    ]
    return {
        "bytes": process.memory_info().rss,
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "hooks": sum(map(len, hooks)),
        "objects": len(gc.get_objects()),
        "tensors": sum(isinstance(one, torch.Tensor) for one in gc.get_objects()),
    }


def long_run(stage: int, updates: int) -> list[dict[str, Any]]:
    """What is held after each part of the run, and the seconds that an update took in it."""
    with engine(config(stage)) as made:
        found = []
        for first in range(0, updates, EVERY):
            start = time.perf_counter()
            train(made, [update % DATA for update in range(first, first + EVERY)])
            seconds = time.perf_counter() - start
            found.append({"update": first + EVERY, "seconds": seconds / EVERY} | held(made))
        assert ds_lena.report(made)["update"] == updates
        return found


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_a_long_run_holds_no_more_at_its_end(tmp_path: Path, stage: int) -> None:
    ranks = Ranks(tmp_path, patience=PATIENCE)
    try:
        of_ranks = ranks.run(long_run, stage, UPDATES)
    finally:
        ranks.stop()
    for rank, found in enumerate(of_ranks):
        print(f"\nrank {rank}, ZeRO {stage}")
        for row in found:
            print("  ", row)
        first, last = found[1], found[-1]  # caches fill in the first part
        same = ("handles", "threads", "hooks", "tensors")
        assert {key: last[key] for key in same} == {key: first[key] for key in same}
        assert last["objects"] <= first["objects"] + 50  # DeepSpeed's timers and torch's caches
        assert last["bytes"] <= first["bytes"] + GROWN
