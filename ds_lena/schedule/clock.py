"""The clock of a run, in base-batch iterations: how many are done and planned, and when the rest is planned anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import algorithm
from .algorithm import Clock


@dataclass(frozen=True)
class RunPlan:
    """What is known of the run at an update. None for what is not known.

    `total_steps`: planned updates T. `planned_n`: micro-batches of a full update as configured now. Where the caller
    decides when an update ends, it may have more. `grows`: the batch grows, and `planned_n` is what it began with.
    `micro_batch_size`: samples in a micro-batch.
    """

    total_steps: int | None = None
    planned_n: int | None = None
    micro_batch_size: int | None = None
    grows: bool = False

    def growing_from(self, n: int) -> RunPlan:
        """The same for a batch that grows. H stays that of its first n."""
        return replace(self, planned_n=n, grows=True)


@dataclass(frozen=True)
class ClockState:
    """What the clock remembers.

    `done` (): P. `planned` (): H, None before the first update. `planned_for` (): the n that H was planned for.
    `updates`: t, the applied updates. `k`: the base batch in micro-batches at the last update.
    `plan`: the run as known at the last update.
    `is_resumed`: this was loaded from a checkpoint, and no update has been applied since.
    `follows_first`: one update has been applied since the start or a resume. `first_n` (): the n to plan with as far as
    it was known then. Later it means nothing, and is there for all states to have the same tensors.
    """

    done: Tensor
    planned: Tensor | None
    planned_for: Tensor
    updates: int = 0
    k: float = 1.0
    plan: RunPlan = RunPlan()
    is_resumed: bool = False
    follows_first: bool = False
    first_n: Tensor | None = None

    @classmethod
    def start(cls, device: torch.device) -> ClockState:
        """The clock before the first update."""
        return cls(done=scalar(0.0, device), planned=None, planned_for=scalar(0.0, device))


def scalar(value: float, device: torch.device) -> Tensor:
    """() float64. A fill does not wait for the GPU, as a copy from the CPU would."""
    return torch.full((), value, dtype=torch.float64, device=device)


def largest_step(n: Tensor, k: float, variant: str) -> Tensor:
    """(): the most base-batch iterations that one update of n micro-batches can be worth."""
    return n if variant == "authors-code" else algorithm.largest_gain(n, k)


def advance(state: ClockState, n: Tensor, k: float, plan: RunPlan, variant: str) -> tuple[Clock, ClockState]:
    """P and H at an update of n micro-batches, and the clock's state if that update is applied."""
    done = state.done + largest_step(n, k, variant)
    is_first = state.planned is None or state.is_resumed
    full = _full(n, plan)
    if plan.total_steps is None:
        planned, planned_for = scalar(math.inf, n.device), n
    elif state.planned is None:
        planned, planned_for = plan.total_steps * largest_step(full, k, variant), full
    else:
        planned, planned_for = _planned(state, state.planned, n, k, plan, variant)
    after = ClockState(done, planned, planned_for, state.updates + 1, k, plan, follows_first=is_first, first_n=full)
    return Clock(done, planned), after


def _planned(
    state: ClockState, before: Tensor, n: Tensor, k: float, plan: RunPlan, variant: str
) -> tuple[Tensor, Tensor]:
    """H, and the n that it is planned for, of a run that has begun. `before`: H so far.

    At the start H is T x R. A run that resumes with another n, k or T is planned anew. The n of a single window can be
    short by chance. So H is planned for the largest of the configured n and those of the first two windows since the
    start or the resume; and the first window of a resumed run alone makes it no smaller. The windows of a batch that
    grows say nothing of H.
    """
    if state.is_resumed:
        is_same_run = (plan.total_steps, k) == (state.plan.total_steps, state.k)
        is_as_before = plan.planned_n in (None, state.plan.planned_n)
        full = torch.maximum(_full(n, plan), state.planned_for) if is_as_before else _full(n, plan)
    elif state.plan.grows:
        return before, state.planned_for
    elif state.follows_first and state.first_n is not None and state.plan.total_steps is not None:
        full, is_same_run = torch.maximum(n, state.first_n), True
        k, plan = state.k, state.plan  # what has changed since the first update waits for a resume
    else:
        return before, state.planned_for
    assert plan.total_steps is not None, "H is known"
    anew = state.done + max(plan.total_steps - state.updates, 0) * largest_step(full, k, variant)
    return torch.where((full == state.planned_for) & is_same_run, before, anew), full


def _full(n: Tensor, plan: RunPlan) -> Tensor:
    """The n of a full window, as far as this one and the configuration show it."""
    configured = scalar(float(plan.planned_n or 0), n.device)
    return configured if plan.grows else torch.maximum(n, configured)
