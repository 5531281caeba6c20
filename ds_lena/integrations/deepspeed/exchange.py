"""What the ranks of one model tell each other once, when LENA is attached, so that all of them know or refuse alike.

All exchanges go over one group, that of all ranks, and come in the same order on each of them. So a rank that fails
can tell all others at their next exchange, whichever that is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ...errors import ConfigError, LenaError
from ...keys import group_keys, number_in
from ...layers import Member

T = TypeVar("T")


NAMED = 8
"""Ranks that an error names; of more it gives the number."""


class _KnownToAll(BaseException):
    """Carries an error that all ranks have received in the same exchange. Nobody on the way takes it for his own."""

    def __init__(self, error: LenaError) -> None:
        super().__init__(error)
        self.error = error


def from_all(group: dist.ProcessGroup, mine: T) -> list[T]:
    """What each rank of the group gives, in the order of its ranks. Call it within `together` of the same group.

    If a rank gives an error instead, because it failed before, every rank ends its `together` with that error.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for other in found:
        if isinstance(other, LenaError):
            raise _KnownToAll(other)
    return found


def from_some(everything: dist.ProcessGroup, some: dist.ProcessGroup, mine: T) -> list[T]:
    """What each rank of the group `some` gives, in the order of its ranks. All ranks of `everything` call it."""
    found = from_all(everything, mine)
    return [found[dist.get_group_rank(everything, rank)] for rank in dist.get_process_group_ranks(some)]


def together(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on every rank of the group. If it fails with an error of LENA on one, all ranks raise that error.

    Exchanges within `action` go over the same group, in the same order on all ranks.
    """
    try:
        try:
            result, error = action(), None
        except LenaError as raised:
            result, error = None, raised
        from_all(group, error)
    except _KnownToAll as known:
        raise known.error from None
    return result  # type: ignore[return-value]


def require_same_keys(
    group: dist.ProcessGroup,
    keys: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]] = (),
    base: str = "adamw",
) -> None:
    """Compare the checked keys of all ranks, and those of the parameter groups where all ranks have the same groups.

    `base`: the base rule, which says which keys a group may have.

    Raises:
        ConfigError: the first key that is not the same on all of them. It is the same error on every rank.
    """
    of_groups = {
        f'"{key}" of parameter group {number}': number_in(groups[key])
        for number, groups in enumerate(param_groups)
        for key in group_keys(base)
        if key in groups
    }
    mine = {f'"{key}"': value for key, value in keys.items()} | of_groups
    of_ranks = from_all(group, mine)
    numbers = dist.get_process_group_ranks(group)
    for key in {key: None for given in of_ranks for key in given}:
        holders: dict[Any, list[int]] = {}
        for number, given in zip(numbers, of_ranks, strict=True):
            value = given.get(key, "nothing")
            holders.setdefault(tuple(value) if isinstance(value, list) else value, []).append(number)
        if len(holders) > 1:
            found = ", ".join(f"{value!r} on {_ranks(held)}" for value, held in holders.items())
            raise ConfigError(
                f"LENA: {key} is not the same on all ranks: {found}. Give all ranks the same keys. If a script "
                "computes a key, compute it on one rank and broadcast it."
            )


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) > NAMED:
        return f"{len(numbers)} ranks ({', '.join(map(str, numbers[:NAMED]))}, …)"
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def members_of_all(group: dist.ProcessGroup, is_split: bool, mine: Sequence[Member]) -> list[Member]:
    """The parameters of all ranks, each name once. Ranks of a model that is not split hold the same ones.

    Raises:
        ConfigError: ranks disagree on a parameter. It is the same error on every rank.
    """
    digest = hashlib.sha256(repr(mine).encode()).digest()
    if len(set(from_all(group, digest))) == 1:
        return list(mine)
    found: dict[str, Member] = {}
    of_ranks = from_all(group, list(mine))
    for rank, members in enumerate(of_ranks):
        for member in members:
            if found.setdefault(member.name, member) != member:
                raise ConfigError(
                    f'LENA: the ranks of one model disagree on "{member.name}": rank {rank} of the model has '
                    f"{member}, another one {found[member.name]}. Give all ranks the same parameter groups and keys."
                )
    for rank, members in enumerate(of_ranks):
        missing = found.keys() - {member.name for member in members}
        if missing and not is_split:
            raise ConfigError(
                f'LENA: rank {rank} does not train "{min(missing)}", and another rank does. Give all ranks the same '
                "parameter groups, and freeze the same parameters."
            )
    return list(found.values())
