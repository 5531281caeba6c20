"""ZeRO 0: every rank holds the whole averaged gradient in `p.grad` and measures its share of the parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from ....layouts.layout import GradientPieces, Layout, Segment


class Zero0Layout(Layout):
    """`step()` gets the parameters themselves, or in bf16 the fp32 copies that `FP16_UnfusedOptimizer` keeps.

    `masters`: each parameter, with the tensor that `step()` moves for it. `copies(parameter)`: the ranks that hold it.
    """

    def __init__(
        self,
        masters: list[tuple[Tensor, Tensor]],
        index: Mapping[int, int],
        copies: Callable[[Tensor], dist.ProcessGroup],
    ) -> None:
        self._masters = [(index[id(parameter)], parameter, master) for parameter, master in masters]
        places = [(i, copies(parameter)) for i, parameter, _ in self._masters]
        self._measured_here = {i for i, group in places if i % dist.get_world_size(group) == dist.get_rank(group)}

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return [(master, [Segment(i, 0, p.numel(), 0)]) for i, p, master in self._masters]

    def gradients(self) -> GradientPieces:
        for i, parameter, _ in self._masters:
            if i in self._measured_here:
                yield i, parameter.grad

    def unchanged_up_to(self) -> int:
        return sys.maxsize  # gradients are reduced after the pass

    def shows_changes(self) -> bool:
        return True

    def thrown_away(self, reached: Sequence[int]) -> list[int]:
        held = {i for i, parameter, _ in self._masters if parameter.grad is not None}
        return [i for i in reached if i not in held]  # DeepSpeed leaves out a parameter without elements

    def discard(self) -> None:
        for _, parameter, _ in self._masters:
            parameter.grad = None
