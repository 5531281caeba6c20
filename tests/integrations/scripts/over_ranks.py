"""Trains over the ranks of a launcher: `over_ranks.py --local_rank N FOLDER AXES [PLACE]`.

AXES: zero2, zero3, tensor or pipeline, several with commas between them. Every rank writes its report and its weights
into FOLDER. With PLACE, rank 1 dies there in the second update: in the backward pass, before the all-reduce of the
statistics, or in the step.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_lena
from benchmarks.command import leave
from ds_lena.grad_stats import statistics
from tests.integrations._engines import Net, config, engine
from tests.integrations._split import TwoParts
from tests.integrations._truth import numbers
from tests.integrations.test_pipeline import pipeline

STAGES = {"zero2": 2, "zero3": 3, "tensor": 1, "pipeline": 1}
UPDATES, DIES_IN, MICRO_BATCHES = 3, 1, 2


def die(folder: Path) -> Any:
    (folder / "died").touch()
    os._exit(1)


def prepare_death(made: Any, folder: Path, place: str) -> None:
    def dying(*_: Any, **__: Any) -> Any:
        die(folder)

    if place == "backward":
        next(made.module.parameters()).register_hook(dying)
    elif place == "statistics":
        statistics.sum_over = dying
    else:
        made.basic_optimizer.step = dying


def train(made: Any, axis: str, update: int) -> None:
    data = dist.get_rank() if axis.startswith("zero") else 0
    pairs = [[numbers(part, data, micro, update, shape=(2, 4)) for part in (1, 2)] for micro in range(MICRO_BATCHES)]
    if axis == "pipeline":
        made.train_batch(iter(pairs))
        return
    for pair in pairs:
        made.backward(made(*pair))
        made.step()


def weights(made: Any) -> list[torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(made.module.parameters())):
        return [parameter.detach().clone() for parameter in made.module.parameters()]


def main(folder: Path, axis: str, place: str | None) -> None:
    deepspeed.init_distributed("gloo", timeout=timedelta(minutes=5))
    torch.manual_seed(0)
    model = pipeline() if axis == "pipeline" else Net()
    given = {"mpu": TwoParts()} if axis == "tensor" else {}
    with engine(config(STAGES[axis]), model, **given) as made:
        for update in range(UPDATES):
            if place and update == DIES_IN and dist.get_rank() == 1:
                prepare_death(made, folder, place)
            train(made, axis, update)
        torch.save((ds_lena.report(made), weights(made)), folder / f"{axis}.rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("folder", type=Path)
    parser.add_argument("axes")
    parser.add_argument("place", nargs="?", choices=("backward", "statistics", "step"))
    arguments = parser.parse_args()
    for each in arguments.axes.split(","):
        main(arguments.folder, each, arguments.place)
    sys.stdout.flush()
    leave()
