"""The clock of a run in base-batch iterations: what is done, what is planned, and when it is planned anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import algorithm
from .algorithm import Clock


@dataclass(frozen=True)
class RunPlan:
    """What is known of the run at an update, None where it is not.

    `total_steps`: planned updates T. `planned_n`: micro-batches of a full update as configured now.
    `micro_batch_size`: samples in a micro-batch.
    """

    total_steps: int | None = None
    planned_n: int | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class ClockState:
    """What the clock remembers.

    `done` P, `planned` H or None before the first update, `planned_for`: the n that H was planned for; () each.
    `updates` t. `k`: base batch in micro-batches at the last update. `plan`: of the last update.
    `is_resumed`: no update was applied since this was loaded from a checkpoint.
    """

    done: Tensor
    planned: Tensor | None
    planned_for: Tensor
    updates: int = 0
    k: float = 1.0
    plan: RunPlan = RunPlan()
    is_resumed: bool = False

    @classmethod
    def start(cls, device: torch.device) -> ClockState:
        """The clock before the first update."""
        return cls(done=scalar(0.0, device), planned=None, planned_for=scalar(0.0, device))


def scalar(value: float, device: torch.device) -> Tensor:
    """() float64. A fill, not a copy from the host, which would wait for the GPU."""
    return torch.full((), value, dtype=torch.float64, device=device)


def largest_step(n: Tensor, k: float, variant: str) -> Tensor:
    """Base-batch iterations that one update of n micro-batches is worth at most, ()."""
    return n if variant == "authors-code" else algorithm.largest_gain(n, k)


def advance(state: ClockState, n: Tensor, k: float, plan: RunPlan, variant: str) -> tuple[Clock, ClockState]:
    """P and H at an update of n micro-batches, and the state if the update is applied."""
    largest = largest_step(n, k, variant)
    planned, planned_for = _planned(state, n, largest, k, plan, variant)
    done = state.done + largest
    return Clock(done, planned), ClockState(done, planned, planned_for, state.updates + 1, k, plan)


def _planned(
    state: ClockState, n: Tensor, largest: Tensor, k: float, plan: RunPlan, variant: str
) -> tuple[Tensor, Tensor]:
    """H, and the n that it was planned for.

    H is T x R at the start. A run that is resumed with another n, k or T is planned anew. There the configured n
    decides, since one window can be short by chance. Where no n is configured, that of the first update decides.
    """
    device = n.device
    if plan.total_steps is None:
        return scalar(math.inf, device), n
    if state.planned is None:
        return plan.total_steps * largest, n
    if not state.is_resumed:
        return state.planned, state.planned_for
    same_run = (plan.total_steps, k) == (state.plan.total_steps, state.k)
    left = max(plan.total_steps - state.updates, 0)
    if plan.planned_n is None:
        same = (n == state.planned_for) & same_run
        anew = state.done + left * largest
        return torch.where(same, state.planned, anew), torch.where(same, state.planned_for, n)
    if same_run and plan.planned_n == state.plan.planned_n:
        return state.planned, state.planned_for
    n = scalar(float(plan.planned_n), device)
    return state.done + left * largest_step(n, k, variant), n
