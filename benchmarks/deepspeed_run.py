"""Training under DeepSpeed, as one of several ranks: engines that differ in their optimizer and nothing else."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import ds_lena
from benchmarks.models import build_model
from benchmarks.roster import NotAvailable, make
from benchmarks.timing import Lap, Samples, Update

accelerator = get_accelerator()


def join(threads: int) -> None:
    """Become one of the ranks."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of torch.distributed
    torch.set_num_threads(threads)
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)


def device() -> torch.device:
    """Of this rank."""
    return torch.device(accelerator.current_device_name())


def make_engine(optimizer: str, args: argparse.Namespace, stage: int, accumulation: int = 1) -> Any:
    """An engine with a model of its own, from the same random numbers every time. `args`: model and precision.

    Raises:
        NotAvailable: the optimizer cannot be had here or in this stage.
    """
    torch.manual_seed(0)
    model = build_model(args.model).to(device())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # for the stock optimizers; LENA does not need it
        "bf16": {"enabled": args.precision == "bf16"},
        "steps_per_print": 1_000_000,
    }
    made = make(optimizer, model.parameters())
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config)
    except ds_lena.LenaError as error:  # on every rank
        raise NotAvailable(str(error)) from error
    return engine


def trainer(engine: Any, batches: Tensor) -> Update:
    """The function that trains for one update. `batches` (accumulation, 1, tokens): token ids."""

    def update(lap: Lap) -> None:
        for tokens in batches:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            lap("forward_backward")
            engine.step()
            lap("step")

    return update


def end(engines: dict[str, Any]) -> None:
    """Destroy engines and empty the dict; once the caller has dropped their trainers, `free()` their memory."""
    for engine in engines.values():
        engine.destroy()
    engines.clear()


def free() -> None:
    """Of what is not referenced any more."""
    gc.collect()
    accelerator.empty_cache()


def meet(more: bool) -> bool:
    """A barrier; true if every rank wants more."""
    flag = torch.tensor(float(more), device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def from_all_ranks(own: Any) -> list[Any]:
    """The same list on every rank."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    return by_rank


def slowest(samples: Samples) -> Samples:
    """Every entry as on the rank that took longest for it."""
    by_rank = from_all_ranks(samples)

    def longest(name: str, phase: str) -> list[float]:
        return [max(taken) for taken in zip(*(one[name][phase] for one in by_rank), strict=True)]

    return {name: {phase: longest(name, phase) for phase in phases} for name, phases in samples.items()}
