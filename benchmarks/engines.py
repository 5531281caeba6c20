"""The program of one rank: for every stage and accumulation, two DeepSpeed engines train alike models in turn."""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import sys
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from benchmarks.contestants import build_model, make_optimizer, random_tokens
from benchmarks.report import progress
from benchmarks.timing import Lap, Samples, Stopwatch, Update, compare, count_syncs, measure, warm_up

accelerator = get_accelerator()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases one after the other; every rank returns the same."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of torch.distributed
    torch.set_num_threads(args.threads)
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    cases = []
    for accumulation, stage in itertools.product(args.accumulation, args.stages):
        cases.append(_run_case(args, stage, accumulation))
        if dist.get_rank() == 0:
            print(progress(cases[-1]), file=sys.stderr)
        gc.collect()  # the engines
        accelerator.empty_cache()
    dist.destroy_process_group()
    return cases


def _run_case(args: argparse.Namespace, stage: int, accumulation: int) -> dict[str, Any]:
    batches = random_tokens(args.model, (accumulation, 1, args.tokens), seed=dist.get_rank())
    engines = {name: _make_engine(name, args, stage, accumulation) for name in ("adamw", "lena")}
    contestants = {name: _trainer(engine, batches.to(engine.device)) for name, engine in engines.items()}
    warm_up(contestants, updates=2 if accumulation == 1 else 1)
    case: dict[str, Any] = {"stage": stage, "accumulation": accumulation}
    if args.check_sync:
        case["syncs"] = {name: count_syncs(update) for name, update in contestants.items()}
    else:
        stopwatch = Stopwatch(args.clock, accelerator.synchronize)
        runs_ahead = accelerator.device_name() != "cpu"
        case["seconds"] = _slowest(measure(contestants, args.seconds, stopwatch, runs_ahead, _meet))
        case["compared"] = compare(case["seconds"])
    for engine in engines.values():
        engine.destroy()
    return case


def _make_engine(optimizer: str, args: argparse.Namespace, stage: int, accumulation: int) -> Any:
    """An engine with a model of its own. The optimizer is the only thing in which engines differ."""
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
    return engine


def _trainer(engine: Any, batches: Tensor) -> Update:
    """The function that trains for one update. `batches` (accumulation, 1, tokens): token ids."""

    def update(lap: Lap) -> None:
        for tokens in batches:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            lap("forward_backward")
            engine.step()
            lap("step")

    return update


def _meet(more: bool) -> bool:
    """A barrier; true if every rank wants more."""
    flag = torch.tensor(float(more), device=accelerator.current_device_name())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _slowest(samples: Samples) -> Samples:
    """Every entry as on the rank that took longest for it."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, samples)

    def slowest(name: str, phase: str) -> list[float]:
        return [max(taken) for taken in zip(*(one[name][phase] for one in by_rank), strict=True)]

    return {name: {phase: slowest(name, phase) for phase in phases} for name, phases in samples.items()}
