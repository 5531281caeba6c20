"""Moves the parameters: the base rule on every piece of every flat tensor, each with its own layer's learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import StateError
from .rules import Rule
from .shards import FlatPlan


def prepare(state: dict[str, Any], parameter: Tensor, buffers: Sequence[str]) -> dict[str, Any]:
    """The state of one tensor, with `step`, the count of its updates, and `buffers` made as zeros where not there.

    The buffers lie in memory as the parameter does, whatever it was when they were made or saved.
    """
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for name in buffers:
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state[name] = lying_as(parameter, state[name])
    return state


def lying_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it with the parameter's strides: torch's fused kernels go through memory as it comes."""
    if tensor.dim() < 2 or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


class Stepper:
    """One base rule and the cuts of the tensors that it moves. Its state per tensor belongs to the optimizer."""

    def __init__(self, rule: Rule, plans: Mapping[Tensor, FlatPlan]) -> None:
        self._rule = rule
        self._plans = plans
        self._rates_by_lr: dict[float, Sequence[Any]] = {}

    def forget_rates(self) -> None:
        """To be called when an update begins: its factors are others."""
        self._rates_by_lr.clear()

    def step(self, groups: Iterable[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]], factor: Tensor) -> None:
        """Move all tensors of the groups that have a gradient (modified in place, with their state).

        `factor`: what multiplies a group's lr, by what the plans say of each piece: its layer, or its parameter.
        """
        for group in groups:
            names = self._rule.buffers(group)
            rates = None
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    if rates is None:
                        rates = self._rates(factor, group["lr"])
                    own = prepare(state[parameter], parameter, names)
                    own["step"] += 1
                    gradient = lying_as(parameter, gradient)
                    self._move([parameter, gradient, *(own[name] for name in names)], own["step"], rates, group)

    def _rates(self, factor: Tensor, lr: float | Tensor) -> Sequence[Any]:
        """Learning rates, kept for the update: ZeRO-3 calls `step()` once for every sub-group."""
        key = id(lr) if isinstance(lr, Tensor) else lr
        if key not in self._rates_by_lr:
            rates = factor * lr
            # On a GPU the rates stay there, as 0-dim tensors; torch's fused kernels take them in float32.
            self._rates_by_lr[key] = rates.tolist() if rates.device.type == "cpu" else rates.float().unbind()
        return self._rates_by_lr[key]

    def _move(self, tensors: list[Tensor], step: Tensor, rates: Sequence[Any], group: dict[str, Any]) -> None:
        """Move one tensor: `tensors` are itself, its gradient and its buffers."""
        plan = self._plans.get(tensors[0])
        if plan is None:
            raise StateError(
                "LENA: step() was given a tensor that did not exist when the layout was read. The optimizer's "
                "parameters were replaced after construction; construct LENA after that."
            )
        split = [plan.split(tensor) for tensor in tensors]
        for batch in plan.batches:
            pieces, gradients, *buffers = [[parts[i] for i in batch.pieces] for parts in split]
            decay = group["weight_decay"] if batch.decays else 0.0
            self._rule.update(pieces, gradients, buffers, step, rates[batch.rate], decay, group)
