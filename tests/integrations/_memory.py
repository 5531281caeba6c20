"""Counting what is allocated."""

from __future__ import annotations

from collections.abc import Callable

import torch


def allocations(action: Callable[[], None], at_least: int) -> list[int]:
    """Bytes of every allocation of at least this size that the action makes on the CPU, inside of kernels too."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        action()
    events = profile.kineto_results.events()
    return sorted(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() >= at_least)
