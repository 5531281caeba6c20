"""The program of one rank: `python -m tests.helpers.ranks FOLDER FIRST` runs the cases of FOLDER from number FIRST on.

Ranks end after a failed case: what it left behind must not reach the next one. `launch.py` starts them again.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command import leave
from tests.helpers import deepspeed_run, megatron_run, plain_run
from tests.helpers.case import Case
from tests.helpers.launch import result_path, started_path
from tests.helpers.launches import paths_of_a_gpu

FAILED = 3  # exit status after a failed case


def main(folder: Path, first: int) -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    backend = "gloo" if os.environ["DS_ACCELERATOR"] == "cpu" else "nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=5))
    # Its own group: a collective that a failed case left hanging cannot be mistaken for this one.
    control = dist.new_group(backend="gloo")
    started_path(folder).touch()
    cases = pickle.loads((folder / "cases.pkl").read_bytes())
    for number in range(first, len(cases)):
        answer = _attempt(cases[number])
        gc.freeze()  # what is left: imports. A collection after every case need not look at them again.
        path = result_path(folder, number, dist.get_rank())
        torch.save(answer, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        failures = torch.tensor(float("error" in answer))
        dist.all_reduce(failures, group=control)
        if failures:
            return FAILED
    return 0


def _attempt(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        with paths_of_a_gpu() if case.as_on_a_gpu else nullcontext():
            return {"result": _runner(case).run(case)}
    except Exception:
        return {"error": traceback.format_exc()}


def _runner(case: Case) -> ModuleType:
    if case.stage is not None:
        return deepspeed_run
    return megatron_run if case.split else plain_run


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), int(sys.argv[2])))  # no destructors: an engine may wait for its peers for ever
