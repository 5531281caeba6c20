"""A run that can be killed and started again: `train.py --local_rank N FOLDER FAULT`, under the deepspeed launcher.

FAULT is a `Fault` as JSON. The run goes on from FOLDER's checkpoint, if there is one, and saves after every second
update. At its end rank 0 writes report and weights into FOLDER. All numbers of ranks see the same micro-batches.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_lena
from benchmarks.command import leave
from ds_lena.grad_stats import statistics
from tests.faults.fault import Fault
from tests.integrations._engines import Net, config, engine
from tests.integrations._truth import numbers

NOBODY = 65534
STALL = timedelta(seconds=15)  # as long a rank waits for another one
UPDATES, MICRO_BATCHES, EVERY = 8, 4, 2  # a checkpoint after every second update


def main(folder: Path, fault: Fault) -> None:
    if fault.place == "stall":  # DeepSpeed gives its groups torch's default, half an hour
        dist.new_group = functools.partial(dist.new_group, timeout=STALL)
    deepspeed.init_distributed("gloo", timeout=STALL if fault.place == "stall" else timedelta(minutes=2))
    torch.set_num_threads(1)
    world, rank = dist.get_world_size(), dist.get_rank()
    is_victim = rank == fault.rank
    entries = config(fault.stage, fault.precision, gradient_accumulation_steps=MICRO_BATCHES // world)
    goes_on = (folder / "latest").exists()
    with engine(entries, Net(seed=int(goes_on))) as made:
        if goes_on:
            if is_victim and fault.place == "load":
                torch.load = dying(folder)
            made.load_checkpoint(str(folder))
        for update in range(ds_lena.report(made)["update"], UPDATES):
            now = is_victim and update == fault.update
            if now:
                prepare(made, folder, fault)
            for micro in range(rank, MICRO_BATCHES, world):
                pair = [numbers(part, micro, update, shape=(2, 4)) for part in (1, 2)]
                made.backward(made(*pair))
                made.step()
            if (update + 1) % EVERY == 0:
                if now and fault.place in ("save", "after a file"):
                    torch.save = tearing(folder, halves=2 if fault.place == "after a file" else 1)
                if update == fault.update and fault.place == "read-only":
                    (folder / "died").touch()
                    forbid(folder)
                if now and fault.place == "full disk":
                    (folder / "died").touch()
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
                made.save_checkpoint(str(folder), tag="only" if fault.one_tag else f"update{update + 1}")
        with deepspeed.zero.GatheredParameters(list(made.module.parameters())):
            weights = [parameter.detach().clone() for parameter in made.module.parameters()]
        if rank == 0:
            torch.save((ds_lena.report(made), weights), folder / "end.pt")


def prepare(made: Any, folder: Path, fault: Fault) -> None:
    """Have this rank die in its next update."""
    if fault.place == "backward":
        next(made.module.parameters()).register_hook(dying(folder))
    elif fault.place == "all-reduce":
        statistics.sum_over = dying(folder)
    elif fault.place == "step":
        made.basic_optimizer.step = dying(folder)
    elif fault.place == "stall":
        made.basic_optimizer.step = dying(folder, signal.SIGSTOP)
    elif fault.place == "anywhere":
        seconds = random.Random(fault.seed).uniform(0, 0.1)
        threading.Thread(target=lambda: (time.sleep(seconds), die(folder)), daemon=True).start()


def forbid(folder: Path) -> None:
    """From now on this process may not write into the folder. Permissions do not bind the super-user."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


def die(folder: Path, by: signal.Signals = signal.SIGKILL) -> None:
    (folder / "died").touch()
    os.kill(os.getpid(), by)


def dying(folder: Path, by: signal.Signals = signal.SIGKILL) -> Any:
    """A function that is the last one that this process calls."""
    return lambda *_, **__: die(folder, by)


def tearing(folder: Path, halves: int) -> Any:
    """A `torch.save` that dies in the middle of its file, or after both halves."""
    save = torch.save

    def torn(what: Any, path: Any, *rest: Any, **keys: Any) -> None:
        whole = io.BytesIO()
        save(what, whole, *rest, **keys)
        Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) * halves // 2])
        die(folder)

    return torn


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(given[0]), Fault(**json.loads(given[1])))
    sys.stdout.flush()
    leave()
