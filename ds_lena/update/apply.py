"""Applies an update: the base rule on every piece of every flat tensor, with a learning rate for each piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import StateError
from .kernels.launch import Launcher, runs_on
from .kernels.table import Piece, pieces_of
from .rules import Rule
from .rules.common import Pieces
from .segments import Cut

State = Mapping[Tensor, dict[str, Any]]


class Rates:
    """The learning rates of one update. `factor` (P,): what multiplies the group's lr for each parameter."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self._known: dict[Any, Any] = {}

    def on(self, lr: float | Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """(P,) learning rates on the device of the pieces.

        They are kept for the whole update, since ZeRO-3 calls `step()` once per sub-group. Rates on a GPU stay there.
        """
        key = id(lr) if isinstance(lr, Tensor) else lr, device, dtype
        if key not in self._known:
            factor = self.factor.to(device)
            self._known[key] = torch.mul(factor, lr, out=torch.empty_like(factor, dtype=dtype))
        return self._known[key]

    def of(self, lr: float | Tensor, device: torch.device) -> Sequence[Any]:
        """(P,) the same one by one: numbers on the CPU, else 0-dim tensors on `device`."""
        vector = self.on(lr, device, torch.float64 if device.type == "cpu" else torch.float32)
        if id(vector) not in self._known:
            self._known[id(vector)] = vector.tolist() if vector.is_cpu else vector.unbind()
        return self._known[id(vector)]


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
    is_contiguous = parameter.is_contiguous()
    if is_contiguous and tensor.is_contiguous():
        return tensor
    is_dense = is_contiguous or (parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last))
    strides = parameter.stride() if is_dense else torch.empty_like(parameter, device="meta").stride()
    if tensor.stride() == strides:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


class Moving(NamedTuple):
    """A tensor that moves: its cut; the dense tensor, its gradient and its buffers; its count of updates."""

    parameter: Tensor
    cut: Cut
    tensors: list[Tensor]
    step: Tensor


class Applier:
    """One base rule, and the cuts of the tensors that it moves. The optimizer owns the state of each tensor."""

    def __init__(self, rule: Rule, cuts: Mapping[Tensor, Cut]) -> None:
        self._rule = rule
        self._cuts = cuts
        self._launcher = Launcher(rule.kernel) if rule.kernel is not None else None

    def apply(self, groups: Iterable[dict[str, Any]], state: State, rates: Rates) -> None:
        """Move all tensors of the groups that have a gradient (modified in place, with their state)."""
        for group in groups:
            names = self._rule.buffers(group)
            moving = [self._moving(p, names, state) for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            torch._foreach_add_([one.step for one in moving], 1)
            device, one_by_one = moving[0].parameter.device, moving  # the tensors of one group are on one device
            if self._launcher is not None and runs_on(device):
                one_by_one = self._launch(self._launcher, group, moving, rates.on(group["lr"], device))
            for one in one_by_one:
                each = rates.of(group["lr"], device)
                self._rule.update(_pieces(one, group["weight_decay"]), each, one.step, group)
            for one in moving:
                if one.tensors[0] is not one.parameter:
                    one.parameter.copy_(one.tensors[0])

    def _moving(self, parameter: Tensor, buffers: Sequence[str], state: State) -> Moving:
        cut = self._cuts.get(parameter)
        if cut is None:
            raise StateError(
                "LENA: step() was given a tensor that LENA does not know. A parameter was replaced or unfrozen after "
                "LENA was constructed, or after deepspeed.initialize. Do that before."
            )
        own = prepare(state[parameter], parameter, buffers)
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        tensors = [lying_as(parameter, parameter), lying_as(parameter, gradient), *(own[name] for name in buffers)]
        return Moving(parameter, cut, tensors, own["step"])

    def _launch(
        self, launcher: Launcher, group: Mapping[str, Any], moving: Sequence[Moving], rates: Tensor
    ) -> list[Moving]:
        """Move the tensors by a kernel. Returns those that it cannot move."""
        known = [parameter for parameter in group["params"] if parameter in self._cuts]

        def pieces() -> Iterator[Piece]:
            for number, parameter in enumerate(known):
                yield from pieces_of(number, self._cuts[parameter])

        table = launcher.table(tuple(map(id, known)), pieces, rates.device)
        by_id = {id(one.parameter): one for one in moving}
        all_of_table = [by_id.get(id(parameter)) for parameter in known]
        left = launcher.launch(table, [[*one.tensors, one.step] if one else [] for one in all_of_table], group, rates)
        return [one for number in left if (one := all_of_table[number]) is not None]


def _pieces(moving: Moving, weight_decay: float) -> list[Pieces]:
    """The pieces of one tensor, by what they have in common."""
    split = [moving.cut.split(tensor) for tensor in moving.tensors]
    found = []
    for batch in moving.cut.batches:
        parameters, gradients, *buffers = [[parts[i] for i in batch.pieces] for parts in split]
        decay = weight_decay if batch.decays else 0.0
        found.append(Pieces(parameters, gradients, buffers, batch.rate, decay))
    return found
