"""What a controller gets: the parameters, and a description of what runs their updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from .grad_stats.hooks import Parts
from .grad_stats.placement import Placement, data_parallel
from .grad_stats.reduce import Group, rank_in, world_size
from .layers import Member
from .layouts.layout import Layout
from .layouts.plain import PlainLayout
from .schedule.clock import RunPlan


@dataclass(frozen=True)
class Binding:
    """All that a controller knows of what runs its updates: an engine, or plain PyTorch.

    `layout`: where memory is. `placements[i]`: where parameter i stands in the parallel grid.
    `order`: parameter numbers in the order of the model.
    `group`: the ranks that hold all replicas and parts of the model, None for this process alone.
    `members_of_all(members)`: the parameters of all ranks of the group, given this rank's.
    `parts`: makes gradients whole of which several ranks see a part, if set.
    `check(squares)`: called at the first update, if set, with this rank's squares of the averaged gradient (P,).
    `run()`: what is known of the run at an update.
    `largest_norm()`: to which norm gradients are clipped between the measurement and `step()`, 0 for no clipping.
    `moves`: for a base rule, what moves its pieces in place of the rule's own `move`.
    """

    layout: Layout
    placements: Sequence[Placement]
    order: Sequence[int]
    group: Group | None
    members_of_all: Callable[[Sequence[Member]], Sequence[Member]] = lambda members: members
    parts: Parts | None = None
    check: Callable[[Tensor], None] | None = None
    run: Callable[[], RunPlan] = RunPlan
    largest_norm: Callable[[], float] = lambda: 0.0
    moves: Mapping[str, Callable[..., None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """The parameters of one optimizer that need a gradient, in the order of its groups.

    `names`: from the user if `has_names`, else made. `groups_of[i]`: the group of parameter i.
    `left_out[i]`: parameter i is in a group with `"lena": false`. `lr_at_start`: the learning rate of each group.
    `group_sizes`: how many parameters each group has, frozen ones too.
    """

    parameters: Sequence[Tensor]
    names: Sequence[str]
    has_names: bool
    groups_of: Sequence[int]
    left_out: Sequence[bool]
    lr_at_start: Sequence[float]
    group_sizes: Sequence[int]

    def without_empty_groups(self) -> Watched:
        """The same parameters, with the groups counted as DeepSpeed counts them: it drops those without parameters."""
        kept = [i for i, size in enumerate(self.group_sizes) if size]
        return replace(
            self,
            groups_of=[kept.index(i) for i in self.groups_of],
            lr_at_start=[self.lr_at_start[i] for i in kept],
            group_sizes=[self.group_sizes[i] for i in kept],
        )


def plain_binding(parameters: Sequence[Tensor], names: Sequence[str], group: Group | None) -> Binding:
    """The binding to plain PyTorch. The ranks of `group` average the gradients."""
    ranks = world_size(group)
    return Binding(
        layout=PlainLayout(parameters, rank_in(group), ranks),
        placements=data_parallel(names, [p.shape for p in parameters], ranks),
        order=range(len(parameters)),
        group=group,
    )
