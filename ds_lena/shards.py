"""Where this rank's pieces of each parameter lie in the tensors that the optimizer is given.

ZeRO hands the optimizer flat tensors that hold pieces of many parameters, and padding. A parameter may straddle ranks.
What a layout provides (`Host`) is stated here; the layouts are in `plain.py` and `integrations/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .probe import Probe
from .reduce import Group


@dataclass(frozen=True)
class Segment:
    """`length` elements of a flat tensor from `start` on are those of a parameter (its number) from `offset` on."""

    parameter: int
    start: int
    length: int
    offset: int


class Host(Protocol):
    """The surroundings in which LENA runs: plain PyTorch, or one kind of DeepSpeed layout."""

    @property
    def group(self) -> Group | None:
        """The ranks over whose micro-gradients the gradient is averaged."""
        ...

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        """For each tensor that `step()` will be given: the pieces of parameters in it, in order."""
        ...

    def squares_of_mean(self) -> Tensor:
        """This rank's share of the squared norms of the averaged, unclipped gradient, (P,); shares add up."""
        ...

    def gradients(self) -> Iterable[tuple[int, Tensor | None]]:
        """This rank's share of what `step()` will move, before any clipping by the surroundings.

        (parameter number, piece of its gradient); None for a piece that is moved with a gradient of zeros. Over all
        ranks each element comes once. A piece belongs to the parameter's only segment on this rank.
        """
        ...

    def clip_coefficient(self, norm: Tensor) -> Tensor | None:
        """What the surroundings multiply a gradient of this norm () by before `step()`; None where they never do."""
        ...

    def shape(self, parameter: int) -> torch.Size:
        """Logical shape of a parameter, whatever part of it is here."""
        ...

    def micro_batch_size(self) -> int | None:
        """Samples in one micro-batch on one GPU, None where nobody knows."""
        ...

    def planned_n(self) -> int | None:
        """Micro-gradients of a full update as configured at present, None where nobody knows."""
        ...

    def total_steps(self) -> int | None:
        """Planned updates of the run as the surroundings know them."""
        ...

    def watch_passes(self, probe: Probe) -> None:
        """Set `probe.before_pass` and `probe.after_pass` to what this layout needs, if anything."""
        ...


@dataclass(frozen=True)
class Batch:
    """Pieces of one flat tensor that move with learning rate number `rate`: positions in the split of the tensor."""

    rate: int
    decays: bool
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class FlatPlan:
    """How one tensor is cut for the update: the sizes of all its parts, padding included, and what moves together."""

    sizes: tuple[int, ...]
    batches: tuple[Batch, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of the parts of `tensor`; the tensor itself, in its own shape, where it is one part."""
        return (tensor,) if len(self.sizes) == 1 else tensor.split(self.sizes)


def plan_flat(numel: int, segments: Sequence[Segment], rates: Sequence[int], decays: Sequence[bool]) -> FlatPlan:
    """Cut a flat tensor of `numel` elements at the borders of its segments; neighbours that move alike stay whole.

    `rates[i]`: number of the learning rate of parameter i, by its layer say; `decays[i]`: whether it has weight decay.
    """
    sizes: list[int] = []
    moving: dict[tuple[int, bool], list[int]] = {}
    position, last = 0, None
    for segment in segments:
        if segment.start > position:
            sizes.append(segment.start - position)
            last = None
        key = (rates[segment.parameter], decays[segment.parameter])
        if key == last:
            sizes[-1] += segment.length
        else:
            moving.setdefault(key, []).append(len(sizes))
            sizes.append(segment.length)
        position, last = segment.start + segment.length, key
    if numel > position:
        sizes.append(numel - position)
    return FlatPlan(tuple(sizes), tuple(Batch(rate, decay, tuple(where)) for (rate, decay), where in moving.items()))
