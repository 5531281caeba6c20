"""The clock of a run, in base-batch iterations: how many are done and planned, and when the rest is planned anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import algorithm
from .algorithm import Clock


@dataclass(frozen=True)
class RunPlan:
    """What is known of the run at an update. None for what is not known.

    `total_steps`: planned updates T. `planned_n`: micro-batches of a full update as configured now.
    `micro_batch_size`: samples in a micro-batch.
    """

    total_steps: int | None = None
    planned_n: int | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class ClockState:
    """What the clock remembers.

    `done` (): P. `planned` (): H, None before the first update. `planned_for` (): the n that H was planned for.
    `updates`: t, the applied updates. `k`: the base batch in micro-batches at the last update.
    `plan`: the run as known at the last update.
    `is_resumed`: this was loaded from a checkpoint, and no update has been applied since.
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
    """() float64. A fill does not wait for the GPU, as a copy from the CPU would."""
    return torch.full((), value, dtype=torch.float64, device=device)


def largest_step(n: Tensor, k: float, variant: str) -> Tensor:
    """(): the most base-batch iterations that one update of n micro-batches can be worth."""
    return n if variant == "authors-code" else algorithm.largest_gain(n, k)


def advance(state: ClockState, n: Tensor, k: float, plan: RunPlan, variant: str) -> tuple[Clock, ClockState]:
    """P and H at an update of n micro-batches, and the clock's state if that update is applied."""
    largest = largest_step(n, k, variant)
    planned, planned_for = _planned(state, n, largest, k, plan, variant)
    done = state.done + largest
    return Clock(done, planned), ClockState(done, planned, planned_for, state.updates + 1, k, plan)


def _planned(
    state: ClockState, n: Tensor, largest: Tensor, k: float, plan: RunPlan, variant: str
) -> tuple[Tensor, Tensor]:
    """H, and the n that it was planned for.

    At the start, H is T x R. A run that resumes with another n, k or T is planned anew, for the configured n: the n of
    a single window can be short by chance. If no n is configured, the n of the first update is taken.
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
