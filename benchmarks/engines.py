"""The program of one rank: for every stage and accumulation, two DeepSpeed engines train alike models in turn."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from contestants import build_model, make_optimizer, random_tokens
from deepspeed.accelerator import get_accelerator
from timing import Lap, Samples, Update, compare, count_syncs, measure, warm_up

accelerator = get_accelerator()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases one after the other; every rank returns the same."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    cases = [_run_case(args, stage, accumulation) for accumulation in args.accumulation for stage in args.stages]
    dist.destroy_process_group()
    return cases


def _run_case(args: argparse.Namespace, stage: int, accumulation: int) -> dict[str, Any]:
    begin = time.monotonic()
    case: dict[str, Any] = {"stage": stage, "accumulation": accumulation}
    with _trainer("adamw", args, stage, accumulation) as adamw, _trainer("lena", args, stage, accumulation) as lena:
        contestants = {"adamw": adamw, "lena": lena}
        warm_up(contestants)
        if args.check_sync:
            case["syncs"] = {name: count_syncs(update) for name, update in contestants.items()}
        else:
            runs_ahead = accelerator.device_name() != "cpu"
            case["seconds"] = _slowest(
                measure(contestants, args.seconds, accelerator.synchronize, runs_ahead, _meet),
            )
            case["compared"] = compare(case["seconds"])
    if dist.get_rank() == 0:
        print(f"ZeRO {stage}, accumulation {accumulation}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return case


@contextmanager
def _trainer(optimizer: str, args: argparse.Namespace, stage: int, accumulation: int) -> Iterator[Update]:
    """An engine of its own, and the function that trains it for one update."""
    torch.manual_seed(0)
    model = build_model(args.model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": args.precision == "bf16"},
        "steps_per_print": 1_000_000,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(optimizer, model.parameters()), config=config
    )
    batches = random_tokens(args.model, (accumulation, 1, args.tokens), seed=dist.get_rank()).to(engine.device)

    def update(lap: Lap) -> None:
        for tokens in batches:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            lap("forward_backward")
            engine.step()
            lap("step")

    try:
        yield update
    finally:
        engine.destroy()
        del engine, model
        gc.collect()
        accelerator.empty_cache()


def _meet(more: bool) -> bool:
    """A barrier; true if every rank wants more."""
    flag = torch.tensor(float(more), device=accelerator.current_device_name())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _slowest(samples: Samples) -> Samples:
    """Every entry as on the rank that took longest for it."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, samples)
    return {
        name: {phase: [max(taken) for taken in zip(*(one[name][phase] for one in by_rank), strict=True)] for phase in of}
        for name, of in samples.items()
    }
