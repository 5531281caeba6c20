"""Applies an update: the base rule on every piece of every flat tensor, with a learning rate for each piece."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from .rules import Rule
from .rules.common import Pieces
from .segments import Cut

State = Mapping[Tensor, dict[str, Any]]


class Rates:
    """The learning rates of one update. `factor` (P,): what multiplies the group's lr for each parameter."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self._known: dict[tuple[Any, torch.device], Sequence[Any]] = {}

    def of(self, lr: float | Tensor, device: torch.device) -> Sequence[Any]:
        """(P,) learning rates on the device of the pieces: numbers on the CPU, else 0-dim float32 tensors on `device`.

        They are kept for the whole update, since ZeRO-3 calls `step()` once per sub-group. Rates on a GPU stay there.
        """
        key = id(lr) if isinstance(lr, Tensor) else lr, device
        if key not in self._known:
            rates = (self.factor * lr).to(device)
            self._known[key] = rates.tolist() if device.type == "cpu" else rates.float().unbind()
        return self._known[key]


def prepare(state: dict[str, Any], parameter: Tensor, buffers: Sequence[str]) -> dict[str, Any]:
    """The state of one tensor. Makes what it does not have yet: `step`, the count of its updates, and zero `buffers`.

    The buffers lie as the dense parameter does, also if they were made or saved with other strides.
    """
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for name in buffers:
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state[name] = lying_as(parameter, state[name])
    return state


def lying_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it with the strides of the dense parameter.

    torch's fused kernels walk through memory and ignore strides. A parameter whose memory has gaps, as a slice of
    columns has, is no memory to walk through: the strides are then those of torch's dense copy of it.
    """
    is_dense = parameter.is_contiguous() or (
        parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    )
    strides = parameter.stride() if is_dense else torch.empty_like(parameter, device="meta").stride()
    if tensor.stride() == strides:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


class Applier:
    """One base rule, and the cuts of the tensors that it moves. The optimizer owns the state of each tensor."""

    def __init__(self, rule: Rule, cuts: Mapping[Tensor, Cut]) -> None:
        self._rule = rule
        self._cuts = cuts

    def apply(self, groups: Iterable[dict[str, Any]], state: State, rates: Rates) -> None:
        """Move all tensors of the groups that have a gradient (modified in place, with their state)."""
        for group in groups:
            names, of_group = self._rule.buffers(group), None
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if of_group is None:  # the tensors of one group are on one device
                    of_group = rates.of(group["lr"], parameter.device)
                own = prepare(state[parameter], parameter, names)
                own["step"] += 1
                dense = lying_as(parameter, parameter)
                tensors = [dense, lying_as(parameter, parameter.grad), *(own[name] for name in names)]
                pieces = self._pieces(parameter, tensors, group["weight_decay"])
                self._rule.update(pieces, of_group, own["step"], group)
                if dense is not parameter:
                    parameter.copy_(dense)

    def _pieces(self, parameter: Tensor, tensors: Sequence[Tensor], weight_decay: float) -> list[Pieces]:
        """The pieces of one tensor that move. `tensors`: the dense tensor, its gradient and its buffers."""
        cut = self._cuts.get(parameter)
        if cut is None:
            raise StateError(
                "LENA: step() was given a tensor that LENA does not know. A parameter was replaced or unfrozen after "
                "LENA was constructed, or after deepspeed.initialize. Do that before."
            )
        split = [cut.split(tensor) for tensor in tensors]
        found = []
        for batch in cut.batches:
            parameters, gradients, *buffers = [[parts[i] for i in batch.pieces] for parts in split]
            decay = weight_decay if batch.decays else 0.0
            found.append(Pieces(parameters, gradients, buffers, batch.rate, decay))
        return found
