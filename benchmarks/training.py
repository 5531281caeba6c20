"""One optimizer at work, in plain PyTorch or under DeepSpeed: for what is observed rather than timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks import command
from benchmarks.models import POSITIONS, SIZES, random_tokens
from benchmarks.timing import Update

PLAIN = "plain"
LAYOUTS = (PLAIN, "0", "1", "2", "3")
"""Plain PyTorch in one process, or a ZeRO stage on several ranks."""


def add_training(parser: Any, model: str = "30m") -> None:
    add = parser.add_argument
    add("--model", choices=SIZES, default=model, help=f"default: {model}")
    add("--tokens", type=int, default=512, help=f"per micro-batch, at most {POSITIONS}; default: 512")
    add("--precision", choices=("fp32", "bf16"), default="fp32")


def observe(
    layout: str, optimizer: str, args: argparse.Namespace, look: Callable[[Update, int], dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """Start training in this layout and return what `look(update, parameters)` sees on every rank.

    None on all ranks but the first. For processes made for this: they are left as members of a group that has ended.
    """
    if layout == PLAIN:
        from benchmarks.plain_run import make_trainer

        return [look(*make_trainer(optimizer, args, command.one_process(args.threads)))]
    return _under_deepspeed(int(layout), optimizer, args, look)


def _under_deepspeed(
    stage: int, optimizer: str, args: argparse.Namespace, look: Callable[[Update, int], dict[str, Any]]
) -> list[dict[str, Any]] | None:
    import torch.distributed as dist

    from benchmarks import deepspeed_run as ranks  # slow to import, and not needed in plain PyTorch

    ranks.join(args.threads)
    engine = ranks.make_engine(optimizer, args, stage)
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    batches = random_tokens(args.model, (1, 1, args.tokens), seed=dist.get_rank()).to(engine.device)
    found = ranks.from_all_ranks(look(ranks.trainer(engine, batches), parameters))
    first = dist.get_rank() == 0
    ranks.end({optimizer: engine})
    dist.destroy_process_group()
    return found if first else None
