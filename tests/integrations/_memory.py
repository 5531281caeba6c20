"""Counting what is allocated, and what stays."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def allocations(action: Callable[[], None], at_least: int) -> list[int]:
    """Bytes of every allocation of at least this size that the action makes on the CPU, inside of kernels too."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        action()
    events = profile.kineto_results.events()
    return sorted(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() >= at_least)


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    while gc.collect():  # once is not enough for engines, which have finalizers
        pass
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
