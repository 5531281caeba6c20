"""Pipeline parallelism: a rank holds the layers of one stage. A tied weight has a copy on several stages.

Each stage sees a part of a tied weight's gradient. The first of them adds the parts up, before the square is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ....errors import UnsupportedError
from ....grad_stats.hooks import GradientHooks
from ....grad_stats.placement import Placement
from .._internals.grid import Grid, tied_weights


def amend(
    grid: Grid, model: torch.nn.Module, parameters: Sequence[Tensor], placements: Sequence[Placement]
) -> list[Placement]:
    """Have the first stage that holds a tied weight count for it, and add up its gradient."""
    if grid.pipe_ranks == 1:
        return list(placements)
    return join_ties(
        {id(weight): (ranks, group) for weight, ranks, group in tied_weights(model)}, parameters, placements
    )


def join_ties(
    ties: Mapping[int, tuple[Sequence[int], dist.ProcessGroup]],
    parameters: Sequence[Tensor],
    placements: Sequence[Placement],
) -> list[Placement]:
    """Have the first rank that holds a tied weight count for it, and add up its gradient.

    `ties`: by id of the weight, the ranks that hold a copy, in the order of their stages, and their group.
    """
    tag_of = {weight: tag for tag, weight in enumerate(ties)}
    amended = []
    for parameter, placement in zip(parameters, placements, strict=True):
        if id(parameter) in ties:
            tag, (ranks, group) = tag_of[id(parameter)], ties[id(parameter)]
            is_first = dist.get_rank() == ranks[0]
            join = _receiver(ranks[1:], group, tag) if is_first else _sender(ranks[0], group, tag)
            placement = replace(placement, counted=placement.counted and is_first, join=join)
        amended.append(placement)
    return amended


def _receiver(others: Sequence[int], group: dist.ProcessGroup, tag: int) -> Callable[[Tensor], Tensor]:
    """Adds the parts of the other stages. Their backward of a micro-batch is over when the first stage's begins."""

    def receive(gradient: Tensor) -> Tensor:
        total, part = gradient.contiguous().clone(), torch.empty_like(gradient, memory_format=torch.contiguous_format)
        for rank in others:
            dist.recv(part, src=rank, group=group, tag=tag)
            total += part
        return total

    return receive


def _sender(first: int, group: dist.ProcessGroup, tag: int) -> Callable[[Tensor], None]:
    """Sends this stage's part, and does not wait."""
    on_the_way: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(gradient: Tensor) -> None:
        while on_the_way and (on_the_way[0][0] is None or on_the_way[0][0].is_completed()):
            on_the_way.popleft()
        part = gradient.contiguous().clone()
        on_the_way.append((dist.isend(part, dst=first, group=group, tag=tag), part))

    return send


def passes_check(grid: Grid, hooks: GradientHooks, micro_batches: Callable[[], int]) -> Callable[[Tensor], None] | None:
    """What raises `UnsupportedError` unless this stage saw one backward pass per micro-batch, for the first update."""
    if grid.pipe_ranks == 1:
        return None

    def check(_: Tensor) -> None:
        if hooks.passes != micro_batches():
            raise UnsupportedError(
                f"LENA: rank {dist.get_rank()} saw {hooks.passes} backward passes for {micro_batches()} micro-batches. "
                "A stage that hands on several tensors has one for each of them, and a stage without trained "
                "parameters has none. Cut the model (partition_method) so that each stage trains something and hands "
                "on one floating-point tensor."
            )

    return check
