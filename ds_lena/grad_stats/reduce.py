"""The sum of one small buffer over the ranks of a group.

No other file outside `integrations/` uses torch.distributed.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def world_size(group: Group | None) -> int:
    """The number of ranks in the group. None stands for this process alone."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Group | None) -> int:
    """This process's rank in the group."""
    return 0 if group is None else dist.get_rank(group)


def sum_over(buffer: Tensor, group: Group | None) -> Tensor:
    """Sum `buffer` over the group, in place, by one all-reduce. A group of one rank needs none."""
    if world_size(group) > 1:
        dist.all_reduce(buffer, group=group)
    return buffer


def default_group() -> Group | None:
    """All ranks if torch.distributed is initialized, else this process alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return None
