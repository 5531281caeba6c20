"""What the ranks of one model tell each other once, when LENA is attached, so that all of them know or refuse alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ...errors import ConfigError, LenaError
from ...layers import Member

T = TypeVar("T")


def from_all(group: dist.ProcessGroup, mine: T) -> list[T]:
    """What each rank of the group gives, in the order of its ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def together(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on every rank of the group. If it fails with an error of LENA on one, all ranks raise that error."""
    result, error = None, None
    try:
        result = action()
    except LenaError as raised:
        error = raised
    failed = [other for other in from_all(group, error) if other is not None]
    if failed:
        raise failed[0]
    return result  # type: ignore[return-value]


def members_of_all(group: dist.ProcessGroup, mine: Sequence[Member]) -> list[Member]:
    """The parameters of all ranks, each name once.

    Raises:
        ConfigError: ranks disagree on a parameter. It is the same error on every rank.
    """
    found: dict[str, Member] = {}
    for rank, members in enumerate(from_all(group, list(mine))):
        for member in members:
            if found.setdefault(member.name, member) != member:
                raise ConfigError(
                    f'LENA: the ranks of one model disagree on "{member.name}": rank {rank} of the model has '
                    f"{member}, another one {found[member.name]}. Give all ranks the same parameter groups and keys."
                )
    return list(found.values())
