"""The sum of one small buffer over the ranks of a group, and, once in a run, its smallest and largest values.

No other file outside `integrations/` uses torch.distributed.
"""

from __future__ import annotations

import logging
import os
import threading

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("ds_lena")

Group = dist.ProcessGroup

PATIENCE = 30.0
"""Seconds without the other ranks after which a rank says what it waits for."""


def world_size(group: Group | None) -> int:
    """The number of ranks in the group. None stands for this process alone."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Group | None) -> int:
    """This process's rank in the group."""
    return 0 if group is None else dist.get_rank(group)


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the run, or the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def sum_over(buffer: Tensor, group: Group | None) -> Tensor:
    """Sum `buffer` over the group, in place, by one all-reduce. A group of one rank needs none."""
    if world_size(group) > 1:
        dist.all_reduce(buffer, group=group)
    return buffer


def extremes_over(values: Tensor, group: Group | None, late: str) -> tuple[list[float], list[float]]:
    """The smallest and the largest of each value over the group, by one all-reduce, on the host.

    `late`: what to log if the other ranks do not come within `PATIENCE`.
    """
    both = torch.cat((-values, values))
    timer = threading.Timer(PATIENCE, logger.warning, args=(late,), kwargs={"extra": {"every_rank": True}})
    timer.daemon = True
    timer.start()
    try:
        if world_size(group) > 1:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        numbers = both.tolist()
    finally:
        timer.cancel()
    return [-number for number in numbers[: len(values)]], numbers[len(values) :]


def default_group() -> Group | None:
    """All ranks if torch.distributed is initialized, else this process alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return None
