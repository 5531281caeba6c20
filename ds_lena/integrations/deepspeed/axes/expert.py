"""Expert parallelism: the experts of a `deepspeed.moe` layer are spread over e ranks, which send each other tokens.

In one backward pass an expert sees tokens of the micro-batches of all e ranks, so its micro-gradient holds e
micro-batches. DeepSpeed adds up over the ranks that hold a copy of the expert, and divides as if it were dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ....errors import ConfigError, UnsupportedError
from ....grad_stats.placement import Placement
from ....grad_stats.reduce import Group
from .._internals.grid import Expert, Grid, experts, is_marked_as_expert
from ..exchange import from_all


def amend(
    grid: Grid, model: torch.nn.Module, parameters: Sequence[Tensor], placements: Sequence[Placement]
) -> list[Placement]:
    """Give an expert its number in the whole layer, and the ranks that average its gradient."""
    expert_of = experts(model)
    if grid.expert_ranks > 1:
        found = (expert_of.get(id(parameter)) for parameter in parameters)
        require_one_order(grid.everything, list(dict.fromkeys(expert.ranks for expert in found if expert is not None)))
    amended = []
    for parameter, placement in zip(parameters, placements, strict=True):
        expert = expert_of.get(id(parameter))
        if expert is not None:
            placement = replace(
                placement,
                name=_with_number(placement.name, expert),
                replicas=placement.replicas // expert.ranks,
                spread=expert.ranks,
            )
        elif is_marked_as_expert(parameter):
            raise UnsupportedError(
                f'LENA: "{placement.name}" is marked as an expert (allreduce = False), but is in no layer of '
                "deepspeed.moe, so its number among the experts of all ranks is not known. Use deepspeed.moe.layer.MoE."
            )
        amended.append(placement)
    return amended


def require_one_order(group: Group, sizes: Sequence[int]) -> None:
    """Raise `ConfigError` if the groups of experts come in another order on another rank.

    `sizes`: their `ep_size`, in the order of the optimizer.
    """
    of_ranks = from_all(group, list(sizes))
    if any(other != of_ranks[0] for other in of_ranks):
        raise ConfigError(
            "LENA: DeepSpeed orders the experts' parameter groups by a hash, which differs from process to process. "
            f"By ep_size they are {of_ranks} on the ranks: with any optimizer, ranks would clip by different norms or "
            "wait for each other for ever. Set the environment variable PYTHONHASHSEED to one number for all ranks, or "
            "use one ep_size."
        )


def _with_number(name: str, expert: Expert) -> str:
    before, _, after = name.rpartition(f"deepspeed_experts.{expert.local}.")
    return f"{before}deepspeed_experts.{expert.number}.{after}"
